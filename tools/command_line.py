"""The `graphopt` command: finds the verb's script, runs it, and turns what goes wrong into one line and an exit code.

0 done, 1 ran and failed, 2 the command line or an input is unusable, 130 Ctrl-C.
"""

from __future__ import annotations

from graphopt.tools import interrupt

with interrupt.leaving():
    import argparse
    import contextlib
    import difflib
    import errno
    import importlib
    import itertools
    import os
    import re
    import sys
    import traceback
    import warnings
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path
    from typing import NoReturn, Protocol, TextIO, cast

    from graphopt.errors import CaptureWarning, GraphoptError, RecipeError, UsageError
    from graphopt.optional import missing_extra
    from graphopt.tools.output_file import check_outputs

VERBS = {
    "inspect": "inspect_model",
    "list-passes": "list_passes",
    "list-targets": "list_targets",
    "doctor": "doctor",
    "optimize": "optimize",
    "run-pass": "run_pass",
    "explain": "explain",
    "compile": "compile",
    "package": "package",
    "tune": "tune",
    "run": "run",
    "compare": "compare",
    "benchmark": "benchmark",
    "profile": "profile_artifact",
    "conformance": "conformance",
}
INTERRUPTED = 130
UNUSABLE_INPUT = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EROFS)

OUT_OF_MEMORY = ("failed to map segment", "cannot allocate memory", "can't allocate memory", "std::bad_alloc")


class Script(Protocol):
    """What each file in tools/ that is a verb provides; heavy imports belong inside `run`."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


class Parser(argparse.ArgumentParser):
    """Raises UsageError with the nearest existing name instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"argument VERB: invalid choice: '([^']*)'", message):
            message = f"unknown verb {found[1]!r}; {nearest(found[1], VERBS)}"
        elif found := re.match(r"unrecognized arguments: (-\S+)", message):
            option = found[1].split("=")[0]
            message = f"unknown option {option!r}; {nearest(option, self._option_string_actions)}"
        elif message.startswith("the following arguments are required"):
            message += " (before options that take several values)"
        raise UsageError(f"{message}; see {self.prog} --help")


def nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"


def load_script(verb: str) -> Script:
    return cast(Script, importlib.import_module(f"graphopt.tools.{VERBS[verb]}"))


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser of one verb, or without one the parser that lists them all."""
    if verb is not None:
        script = load_script(verb)
        description = (script.__doc__ or script.SUMMARY).split("\n\n")[0]
        parser = Parser(prog=f"graphopt {verb}", description=description, allow_abbrev=False)
        script.add_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return parser
    listing = "\n".join(f"  {name:14}{load_script(name).SUMMARY}" for name in VERBS)
    parser = Parser(
        prog="graphopt",
        usage="graphopt VERB ...",
        description="Make a trained network smaller and faster on one device, and ship it as one file.",
        epilog=f"verbs:\n{listing}\n\n`graphopt VERB --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("verb", metavar="VERB", nargs="?", choices=list(VERBS), help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and never raises for something a user can cause."""
    words = [kebab(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    try:
        with one_line_warnings():
            return dispatch(words)
    except SystemExit as e:  # argparse after --help
        return e.code if isinstance(e.code, int) else 0
    except KeyboardInterrupt:
        return say_interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing is left to flush to
        return 1
    except Exception as e:
        if interrupt.pressed():  # native code made another error of it
            return say_interrupted()
        if "--debug" in words:
            traceback.print_exc()
        for message in e.mistakes if isinstance(e, RecipeError) else [one_line(e)]:
            print(f"graphopt: error: {message}", file=sys.stderr)
        return exit_code(e)


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """What capturing warns of is said as errors are; other warnings as Python says them."""
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, CaptureWarning):
            print(f"graphopt: warning: {message}", file=sys.stderr)
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


def say_interrupted() -> int:
    print("graphopt: interrupted", file=sys.stderr)
    return INTERRUPTED


def dispatch(words: Sequence[str]) -> int:
    if not words or words[0].startswith("-") or words[0] not in VERBS:
        parser = build_parser()
        chosen, rest = parser.parse_known_args(words[:1])
        if chosen.version:
            from importlib.metadata import version

            print(f"graphopt {version('graphopt')}")
            return 0
        if rest:
            parser.error(f"unrecognized arguments: {rest[0]}")
        parser.error(f"a verb is missing; there are: {', '.join(VERBS)}")
    verb = words[0]
    parser = build_parser(verb)
    refuse_unknown_options(parser, words[1:])
    arguments = parser.parse_args(words[1:])
    check_outputs(arguments)
    return load_script(verb).run(arguments)


def refuse_unknown_options(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Before argparse speaks of arguments that are missing only because an option is misspelt."""
    for word in itertools.takewhile(lambda word: word != "--", words):
        if word.startswith("--") and word.split("=")[0] not in parser._option_string_actions:
            parser.error(f"unrecognized arguments: {word}")


def kebab(word: str) -> str:
    """--batch_size=a_b -> --batch-size=a_b"""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return "out of memory: close other programs, raise the limit (ulimit -v), or give it a smaller model"
    if isinstance(error, ImportError) and (missing := missing_extra("this command", error)):
        return str(missing)
    if isinstance(error, GraphoptError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text}; run again with --debug for the traceback"


def is_out_of_memory(error: Exception) -> bool:
    """The dynamic linker, C++ and torch each have their own words for it."""
    if isinstance(error, GraphoptError):
        return False
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


def exit_code(error: Exception) -> int:
    if is_out_of_memory(error):
        return 1
    if isinstance(error, GraphoptError):
        return error.exit_code
    if isinstance(error, ImportError) and missing_extra("this command", error):
        return 2
    return 2 if isinstance(error, OSError) and error.errno in UNUSABLE_INPUT else 1


def command() -> NoReturn:
    """Entry point of the process."""
    interrupt.install()
    prepare_streams()
    code = main()
    if interrupt.pressed() and code != INTERRUPTED:  # lost on its way, and nothing was written since
        code = say_interrupted()
    interrupt.ignore()
    # Not sys.exit: what runs after it, in Python and in native libraries, answers Ctrl-C with a traceback or a crash.
    os._exit(code if flush() else code or 1)


def prepare_streams() -> None:
    """Streams that were closed take everything, and characters that a stream cannot encode become escapes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the process
        getattr(sys, name).reconfigure(errors="backslashreplace")


def flush() -> bool:
    """Whether all that was printed has arrived."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return False
    except OSError as e:
        print(f"graphopt: error: cannot write to stdout: {e.strerror}", file=sys.stderr)
        return False
    finally:
        sys.stderr.flush()
    return True


def script(path: str) -> NoReturn:
    """Run tools/<name>.py as its verb; its folder leaves sys.path, where its files would be modules of their own."""
    file = Path(path).resolve()
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != file.parent]
    (verb,) = (verb for verb, module in VERBS.items() if module == file.stem)
    sys.argv[1:1] = [verb]
    command()
