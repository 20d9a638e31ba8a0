"""Every error graphopt raises on purpose: one sentence that says what is wrong and what to write instead.

`exit_code` is what the command line ends with: 2 when the command line or an input is unusable, 1 when the work
itself ran and failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import ClassVar

_SHOWN = 16  # elements of a value that a message holds


class GraphoptError(Exception):
    """Base of all errors below."""

    exit_code: ClassVar[int] = 1


class UsageError(GraphoptError):
    """An argument, option or file given by the caller cannot be used."""

    exit_code: ClassVar[int] = 2


class UnknownNameError(UsageError):
    """A pass, option, target, entry, input or output that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known) or 'none'}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class RecipeError(UsageError):
    """A recipe cannot be used; `mistakes` are all that it has, each "file:line: sentence"."""

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(self.mistakes))


class MissingExtraError(UsageError):
    """A package that the base installation leaves out is needed."""


class CaptureError(UsageError):
    """The source is not a model, cannot be read safely, or cannot be captured as asked."""


class FeedError(UsageError):
    """Arrays given to a session or program have the wrong name, dtype, rank or size."""


class BoundInputError(FeedError):
    """An input has another value than the one that the graph was made for: that value decides shapes in it."""

    @classmethod
    def of(cls, name: str, bound: Sequence[object], given: Sequence[object]) -> BoundInputError:
        """`bound` and `given` are all elements, the last axis fastest; there are equally many."""
        said = f"is bound to {list(bound)}, got {list(given)}"
        if len(bound) > _SHOWN:
            place = next(index for index, pair in enumerate(zip(bound, given, strict=True)) if pair[0] != pair[1])
            said = f"is bound to a value of {len(bound)} elements, got {given[place]} for {bound[place]} at {place}"
        return cls(f"input {name!r} {said}; capture the model again with that value in example_inputs")


class CaptureWarning(UserWarning):
    """A size that the source or the caller leaves open is not open in the model."""


class ArtifactError(UsageError):
    """An artifact is truncated, altered, of another format, or made for another machine."""


class PassError(GraphoptError):
    """A pass failed; the message names it and the passes that ran before it."""


class PreconditionError(PassError):
    """A pass was given a program it does not accept."""


class PostconditionError(PassError):
    """A pass returned an ill-formed program."""


class PropagationError(PassError):
    """A node cannot be evaluated on the shapes and types of its arguments; rewriting takes it as a refusal."""


class VerificationError(GraphoptError):
    """A program or artifact does not compute what the program it came from computes."""


class CompileError(GraphoptError):
    """A program cannot be lowered for the target."""


class CodeGenerationError(CompileError):
    """A program was lowered, and no code came of it."""


class FitError(GraphoptError):
    """Training broke down: a loss or gradient that is not finite, or a step that PyTorch cannot compute."""


class WriteError(GraphoptError):
    """A file cannot be written: no space, no permission, no such folder; what was there before is untouched."""


class RunError(GraphoptError):
    """Compiled code failed while it ran."""
