"""Nothing of what torch prints, warns or logs while it exports reaches the user."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_LIBRARIES = ("torch", "onnx", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow prints, warnings and the log records of torch and its exporters; exceptions pass."""
    handlers = _handlers()
    for handler in handlers:
        handler.addFilter(_is_other)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] not in _LIBRARIES


def _handlers() -> list[logging.Handler]:
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in _LIBRARIES)]
    loggers += [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in _LIBRARIES
    ]
    found = {id(handler): handler for logger in loggers for handler in logger.handlers}
    last = [] if logging.lastResort is None else [logging.lastResort]
    return [*found.values(), *last]
