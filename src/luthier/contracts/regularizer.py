"""The contract of a regularizer: a frozen dataclass that IS the entry in the recipe's list and does the work.

What rides beside any method and any objective: noise on the embeddings, a pull of the weights to where they started.
Every hook has a quiet default. What it keeps of the model (copies, squares, handles) lies in the model's modules and
not in the dataclass, under names of its own, out of `state_dict`: files and checkpoints are those of a run without it.

    attach    after the method attached and the weights have their place and format, before the first step
    measure   with losses of single rows, while the weights still are the start's (`rows()` says how many)
    penalty   once for each optimizer step, added to the method's own
    detach    when the training is over: exactly the model that was there, but for what it learnt

`tensors` and `load` are inverses: what `measure` gathered, kept in the run's directory, so that a resumed run goes on
with the very numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import ClassVar

from torch import Tensor, nn

NOISE = "luthier_noise"  # attribute of a module whose noise is meant in training, dropout or not (engine/modes.py)


class Regularizer:
    """Base of every regularizer. Fields carry the field-standard names."""

    paper: ClassVar[str] = ""
    on: str | None = None  # the file of the rows that `measure` looks at; None: the first training rows

    def rows(self) -> int:
        """How many single rows `measure` wants; 0: it is not called."""
        return 0

    def attach(self, model: nn.Module, new: Collection[str] = ()) -> None:
        """`new`: original paths of modules that no file gave weights (a reward model's fresh head). RecipeError where
        the model cannot carry it."""
        raise NotImplementedError

    def measure(self, model: nn.Module, losses: Iterable[Tensor]) -> None:
        """`losses`: -log p of one row after another under the start's weights, in eval mode, differentiable."""

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What `measure` gathered, by names that are the same in every run of a recipe."""
        return {}

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`; ValueError for what is not this model's."""

    def penalty(self, model: nn.Module) -> Tensor | float:
        """A term added once per optimizer step; not divided by any weight."""
        return 0.0

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`."""
        raise NotImplementedError


def adds_penalty(regularizer: Regularizer) -> bool:
    """Whether it has a term of its own: such a gradient comes after the last backward of a step."""
    return type(regularizer).penalty is not Regularizer.penalty
