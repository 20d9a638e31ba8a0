"""Runs one reading function in a child process with limited memory, time and file sizes.

The child imports the standard library and `graphopt.untrusted` alone, which takes a tenth of a second. Whatever becomes
of it, a crash included, the caller gets its result or one sentence. Ctrl-C ends it too.
"""

from __future__ import annotations

import errno
import importlib
import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graphopt.errors import CaptureError
from graphopt.untrusted.limits import Limits

_START = "import sys; sys.path.insert(0, sys.argv[1]); from graphopt.untrusted.child import main; main(sys.argv[2:])"
_RESULT = "result.json"
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_SLACK = 1 << 24  # headers of a copied archive


def run_child(function: str, path: Path, folder: Path, limits: Limits) -> Any:
    """The JSON value that `function` ("module:name") returns for (path, folder, limits), run in a limited child.

    The function may write files into `folder`, which must exist. Raises CaptureError, whose message starts with the
    path, for what the function refuses and where the child goes over a limit, crashes or finds no room.
    """
    package = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-I", "-S", "-c", _START, str(package), function, str(path), str(folder)]
    with (folder / _RESULT).open("wb") as output:
        child = subprocess.Popen(
            [*command, json.dumps(asdict(limits))], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL
        )
        try:
            code = child.wait(limits.max_parse_seconds)
        except subprocess.TimeoutExpired as error:
            raise CaptureError(f"{path}: {_too_slow(limits)}") from error
        finally:
            child.kill()
            child.wait()
    return _result(path, folder / _RESULT, code, limits)


def _result(path: Path, output: Path, code: int, limits: Limits) -> Any:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        raise CaptureError(f"{path}: {_too_slow(limits)}")
    try:
        answer = json.loads(output.read_bytes())
    except ValueError as error:
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise CaptureError(f"{path}: the process that reads it ended with {reason}; the file is damaged") from error
    if "error" in answer:
        raise CaptureError(answer["error"])
    return answer["result"]


def _too_slow(limits: Limits) -> str:
    return f"reading it takes over {limits.max_parse_seconds} seconds; raise Limits.max_parse_seconds"


def main(arguments: list[str]) -> None:
    """The child: limits itself, runs the function and prints {"result": ...} or {"error": sentence}."""
    function, path, folder, text = arguments
    limits = Limits(**json.loads(text))
    _limit(limits)
    try:
        module, _, name = function.partition(":")
        answer = {"result": getattr(importlib.import_module(module), name)(Path(path), Path(folder), limits)}
    except CaptureError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": _too_large(path, limits)}
    except OSError as error:
        too_large = error.errno == errno.ENOMEM  # of a file that is mapped
        answer = {"error": _too_large(path, limits) if too_large else _no_file(path, folder, error)}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()


def _too_large(path: str, limits: Limits) -> str:
    return f"{path}: reading it takes over {limits.max_parse_bytes} bytes of memory; raise Limits.max_parse_bytes"


def _no_file(path: str, folder: str, error: OSError) -> str:
    if error.errno not in _FULL:
        return f"{path} cannot be read: {error.strerror or error}"
    return (
        f"{path}: the temporary folder {Path(folder).parent} has no room for a copy of it ({error.strerror}); "
        "free space there, or set TMPDIR to another folder"
    )


def _limit(limits: Limits) -> None:
    import resource

    wanted = {
        resource.RLIMIT_AS: limits.max_parse_bytes,
        resource.RLIMIT_CPU: limits.max_parse_seconds,
        resource.RLIMIT_FSIZE: limits.max_bytes + _SLACK,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        value = min(value, *(known for known in resource.getrlimit(kind) if known != resource.RLIM_INFINITY), value)
        resource.setrlimit(kind, (value, value))
