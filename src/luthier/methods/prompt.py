"""Prompt tuning: embeddings of P virtual tokens that train, in front of every row.

    h_0 = [P; Emb(x)]        P (P, D), D the width of the embedding; P D numbers train (20 x 4096 = 81,920)

arXiv:2104.08691; file and mathematics are PEFT's (`PROMPT_TUNING`). The virtual tokens live outside the embedding
matrix, so a tied head gains no logits; they are scored nowhere, take the first P positions, and stand once in front of
a shared prompt. They start as embeddings of random tokens (SAMPLE_VOCAB), of a text (TEXT, cut or repeated to P tokens:
the surest start for small models) or at random, N(0, 1) (RANDOM). The last is PEFT's default and not ours: it is many
times larger than any embedding; on a small model held-out loss after 100 steps at one rate was 4.66 with it, else 4.27.

When: many tasks on one large frozen base, the smallest file there is. The paper finds it as good as full fine-tuning
from about 10 billion parameters on, weaker below; LoRA learns more on small models.
Cost: P more tokens in each row (the packer counts them), P positions. Not mergeable: no weight of the base does this.
Left out: families that read embeddings otherwise than tokens (refused, by a look at numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.contracts.errors import RecipeError
from luthier.models.prompt_site import PromptSite, attach_prompt
from luthier.models.virtual_tokens import VIRTUAL_KEYS, Count, VirtualMethod, VirtualTokens, given

STARTS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class PromptTuning(VirtualMethod):
    """A trained soft prompt before every row: kilobytes per task, the base untouched."""

    paper: ClassVar[str] = "arXiv:2104.08691"
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    default_learning_rate: ClassVar[float] = 3e-2
    starts_elsewhere: ClassVar[str] = "virtual tokens stand before every row from the first step"
    config_keys: ClassVar[Mapping[str, Any]] = {
        **VIRTUAL_KEYS, "prompt_tuning_init": (lambda v: v in STARTS, ", ".join(STARTS)),
        "prompt_tuning_init_text": (lambda v: isinstance(v, str) and len(v) <= 10_000, "a text"),
        "tokenizer_name_or_path": (lambda v: isinstance(v, str) and len(v) <= 2048, "a name"),
        "init_token_ids": (
            lambda v: isinstance(v, list) and len(v) <= 10_000 and all(type(i) is int and i >= 0 for i in v),
            "token ids",
        ),
    }  # fmt: skip

    num_virtual_tokens: Count = _doc(20, "length of the prompt: 1-20 for large models, up to 100 for small ones")
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = _doc(
        "SAMPLE_VOCAB", "start from the embeddings of random tokens, from those of a text, or from noise"
    )
    prompt_tuning_init_text: str | None = _doc(None, "that text: a sentence that says what the task is")
    init_token_ids: tuple[int, ...] = _doc((), "the text as token ids, where there is no tokenizer to read it")

    def __post_init__(self) -> None:
        object.__setattr__(self, "init_token_ids", tuple(self.init_token_ids))
        self.check_fields({"prompt_tuning_init": self.prompt_tuning_init in STARTS})
        start, said = self.prompt_tuning_init, bool(self.prompt_tuning_init_text or self.init_token_ids)
        if (start == "TEXT") != said:
            raise RecipeError(
                "TEXT starts from a text" if start == "TEXT" else "a text to start from, and a start without one",
                where="method.prompt_tuning_init", value=start,
                remedy="set prompt_tuning_init: TEXT together with prompt_tuning_init_text",
            )  # fmt: skip

    @property
    def virtual_tokens(self) -> int:  # type: ignore[override]
        return self.num_virtual_tokens

    def with_texts(self, tokenize: Callable[[str], list[int]]) -> PromptTuning:
        if self.prompt_tuning_init_text is None:
            return self
        return replace(self, init_token_ids=tuple(tokenize(self.prompt_tuning_init_text)))

    def put(self, model: nn.Module, name: str) -> PromptSite:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        with torch.no_grad():
            rows = self._start(embedding)
        return attach_prompt(model, VirtualTokens(rows.float()), name)

    def _start(self, embedding: Any) -> Tensor:
        """(P, D), read through the embedding as the model reads it."""
        count, weight = self.num_virtual_tokens, embedding.weight
        if self.prompt_tuning_init == "RANDOM":
            return torch.randn(count, width_of(embedding)).to(weight.device)
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, weight.shape[0], (count,)).tolist()
        else:
            ids = (list(self.init_token_ids) * count)[:count]
        if not ids or max(ids) >= weight.shape[0]:
            raise RecipeError("the text has not been read into tokens of this model", value=ids or None,
                              where="method.init_token_ids", remedy="give a text with at least one token")  # fmt: skip
        rows: Tensor = embedding(torch.tensor(ids, device=weight.device))
        return rows.detach().clone()

    def config(self, model: nn.Module) -> dict[str, Any]:
        """How it started is over: RANDOM is what a reader needs no tokenizer for."""
        width = width_of(model.get_input_embeddings())  # type: ignore[operator]
        return {**super().config(model), **shape_keys(model, width), "prompt_tuning_init": "RANDOM"}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PromptTuning:
        return cls(**given(config, ()))


def width_of(embedding: Any) -> int:
    """Of what the embedding gives, which may be less than its model's width."""
    return int(embedding.weight.shape[1])


def shape_keys(model: nn.Module, width: int) -> dict[str, Any]:
    """What PEFT writes beside the width."""
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    return {
        "token_dim": width, "num_layers": config.num_hidden_layers,
        "num_attention_heads": getattr(config, "num_attention_heads", None) or 1,
    }  # fmt: skip
