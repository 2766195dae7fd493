"""One exception tree. Every error that a person can cause reads as one line:

    code: what — where — value seen — remedy

`where` is `file:line`, `recipe.yaml:line:column` or a recipe path; `value` is what was found there.
The exit code belongs to the class, so no caller ever chooses one. A programming fault is not in this
tree: it travels as the ordinary exception that it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

_LONGEST_VALUE = 120


class LuthierError(Exception):
    """What went wrong, where, the value seen and the remedy; printed as one line by the doors."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str | None = None, value: Any = None, remedy: str | None = None) -> None:
        self.what, self.where, self.value, self.remedy = what, where, value, remedy
        super().__init__(what)

    def line(self) -> str:
        """The one line for people: `code: what — where — value seen — remedy`, absent parts left out."""
        parts = [f"{self.code}: {self.what}"]
        if self.where:
            parts.append(self.where)
        if self.value is not None:
            parts.append(f"saw {_short(self.value)}")
        if self.remedy:
            parts.append(self.remedy)
        return " — ".join(" ".join(part.split()) for part in parts)

    def __str__(self) -> str:
        return self.line()


class UsageError(LuthierError):
    """The command line asks for something that is not there."""

    code, exit_code = "usage", 2


class RecipeError(LuthierError):
    """The recipe says something that cannot be meant, or cannot be done."""

    code, exit_code = "recipe", 2


class NotMergeable(RecipeError):
    """The method changes more than weights, or the base has a form that cannot take the change."""

    code = "not-mergeable"


class DataError(LuthierError):
    """A row, a file or a template cannot be used as it is."""

    code, exit_code = "data", 3


class GateError(LuthierError):
    """A check on the real batches failed; nothing was trained."""

    code, exit_code = "gate", 3


class ModelError(LuthierError):
    """A model or adapter directory cannot be loaded as asked."""

    code, exit_code = "model", 2


class CheckpointError(LuthierError):
    """A checkpoint cannot be written, read, or does not belong to this run."""

    code, exit_code = "checkpoint", 4


class ResourceError(LuthierError):
    """Memory, disk or time ran out."""

    code, exit_code = "resources", 5


class OutOfMemory(ResourceError):
    """Memory ran out and no smaller piece of work is left. `tokens`: of the row that did not fit, where one did not."""

    def __init__(self, what: str, *, tokens: int | None = None, recompute: bool = False, **parts: Any) -> None:
        super().__init__(what, **parts)
        self.tokens, self.recompute = tokens, recompute


class NumericError(LuthierError):
    """Numbers stopped being finite and the guard could not recover."""

    code, exit_code = "numeric", 6


class Stopped(LuthierError):
    """A signal asked the run to stop; its state was saved first. Exit code 128 + signal."""

    code = "stopped"

    def __init__(self, what: str, *, signal: int, **parts: Any) -> None:
        super().__init__(what, **parts)
        self.exit_code = 128 + signal  # type: ignore[misc]


class Errors(LuthierError):
    """Several errors found in one pass, shown together; the exit code is that of the first."""

    def __init__(self, errors: Sequence[LuthierError]) -> None:
        if not errors:
            raise ValueError("Errors needs at least one error")
        self.errors = list(errors)
        first = self.errors[0]
        super().__init__(first.what, where=first.where, value=first.value, remedy=first.remedy)
        self.exit_code = first.exit_code  # type: ignore[misc]

    def line(self) -> str:
        return "\n".join(error.line() for error in self.errors)

    def __reduce__(self) -> tuple[Any, ...]:
        return Errors, (self.errors,)  # so that it can come out of another process


def raise_all(errors: Sequence[LuthierError]) -> None:
    """Raise nothing for none, the error itself for one, `Errors` for several."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Errors(errors)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    text = (value or '""') if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
