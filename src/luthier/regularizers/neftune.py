"""NEFTune: noise on the input embeddings while training, so that answers learn from many neighbours of each prompt.

    e' = e + u * alpha / sqrt(S h),   u ~ U(-1, 1) for every number       S tokens of the row, h the embedding's width

arXiv:2310.05914. The noise is added to what the input embedding gives, whatever stands there: low-rank changes and
rows of added tokens are under it. Only in training: evaluation, the reference policy and generation see none, and with
objectives that switch dropout off it stays on, as in TRL. It is drawn from torch's generator, which every step seeds
anew from (seed, step). Weights, files and tied heads are untouched: nothing trains in it.

S of `length: true` is the paper's: the row's own tokens, padding not counted, also among packed rows. Noise on a shared
prompt is shared by all answers, like dropout there; its S is that of the longest row through it, so that no row
gets more noise than it would get alone. `length: padded` is what transformers computes: the tokens of the longest row
of the microbatch, so the noise depends on how a step is split. Peers' `neftune_noise_alpha` is read as `alpha`.

When: chat answers from small instruction sets; alpha 5, 10 or 15. Cost: one draw for each number of the embedded rows.
Virtual tokens of prompt methods get none and are not counted, as in PEFT.
Leaves out: noise for a padded batch with a mask of its own, which nothing here makes (there S counts the padding).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.contracts.batch import Forest
from luthier.contracts.errors import RecipeError
from luthier.contracts.regularizer import NOISE, Regularizer
from luthier.models.attention import forest_now

LENGTHS = ("true", "padded")


@dataclass(frozen=True, kw_only=True)
class NEFTune(Regularizer):
    """Noise on the input embeddings in training: longer, better answers from small sets of instructions."""

    paper: ClassVar[str] = "arXiv:2310.05914"

    alpha: Annotated[float, Field(gt=0)] = field(
        default=5.0, metadata={"doc": "size of the noise: 5 as a rule, 10 or 15 for more data or longer answers"}
    )
    length: Literal["true", "padded"] = field(
        default="true", metadata={"doc": "true: by each row's own tokens; padded: by the longest of the microbatch"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise RecipeError("noise needs a size", where="regularizers.alpha", value=self.alpha, remedy="such as 5")
        if self.length not in LENGTHS:
            raise RecipeError("no such length", where="regularizers.length", value=self.length, remedy="true or padded")

    def attach(self, model: nn.Module, new: Collection[str] = ()) -> None:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        if hasattr(embedding, NOISE):
            raise RecipeError("the embeddings have noise already", where="regularizers", remedy="name neftune once")
        setattr(embedding, NOISE, embedding.register_forward_hook(self._add))

    def detach(self, model: nn.Module) -> None:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        getattr(embedding, NOISE).remove()
        delattr(embedding, NOISE)

    def _add(self, embedding: nn.Module, given: Any, e_BTD: Tensor) -> Tensor | None:
        if not embedding.training:
            return None
        u_BTD = torch.empty(e_BTD.shape, dtype=torch.float32, device=e_BTD.device).uniform_(-1.0, 1.0)
        forest = forest_now()
        if forest is not None and e_BTD.shape[:2] != (1, forest.tokens):
            forest = None
        return noisy(e_BTD, u_BTD, self.alpha, lengths_of(e_BTD, forest, padded=self.length == "padded"))


def noisy(e_BTD: Tensor, u_BTD: Tensor, alpha: float, lengths_BT: Tensor) -> Tensor:
    """e + u alpha / sqrt(S h), rounded once to e's dtype; `lengths_BT` broadcasts to (B, T)."""
    size_BT1 = alpha / torch.sqrt(lengths_BT.float() * e_BTD.shape[-1]).unsqueeze(-1)
    return (e_BTD + u_BTD * size_BT1).to(e_BTD.dtype)


def lengths_of(e_BTD: Tensor, forest: Forest | None, *, padded: bool) -> Tensor:
    """S of every token: (1, T) in a packed forest, (1, 1) where all rows are as long as the tensor."""
    if forest is None:
        return torch.full((1, 1), e_BTD.shape[1], device=e_BTD.device)
    longest_S = longest_paths(forest)
    if padded:
        return torch.full((1, 1), max(longest_S), device=e_BTD.device)
    sizes_S = [end - start for start, end in zip(forest.start, forest.end, strict=True)]
    return torch.tensor(longest_S).repeat_interleave(torch.tensor(sizes_S))[None].to(e_BTD.device)


def longest_paths(forest: Forest) -> list[int]:
    """Of each segment: tokens of the longest row, root to leaf, that goes through it."""
    first_S = forest.first_position
    found = [at + end - start for at, start, end in zip(first_S, forest.start, forest.end, strict=True)]
    for segment in reversed(range(len(forest))):  # children come after their parents
        if (parent := forest.parent[segment]) >= 0:
            found[parent] = max(found[parent], found[segment])
    return found
