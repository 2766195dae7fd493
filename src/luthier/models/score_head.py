"""The score head of a reward model: one linear to one number, read where a sequence ends.

    r(x, y) = w . h_last        h_last the decoder's hidden row at the sequence's last token

The layout is transformers' `AutoModelForSequenceClassification` with `num_labels` 1 (`score.weight`, no bias), the one
that PEFT, TRL and vLLM read. Padding does not exist here, but transformers looks for the last token that is not
`pad_token_id`: so that token must be one that never ends a row, else others read another row of the same model.
A new head is drawn from the caller's seed, N(0, initializer_range^2) as transformers draws it.

Whether the decoder may be packed is asked of its causal twin: the same modules (or the same few-layer cut) under the
family's language head. Left out: more than one score, heads with a bias or several layers, encoder families.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from luthier.contracts.errors import ModelError

HEAD = "score"
SCORES = "SEQ_CLS"  # PEFT's task type of a model with such a head
PEFT_HEADS = ("classifier", "score")  # what PEFT adds to `modules_to_save` of every SEQ_CLS adapter
_SUFFIX = "ForSequenceClassification"


def score_head(model: nn.Module) -> nn.Module | None:
    """What computes the score (a site that stands there included), None where the model is no reward model."""
    named = type(model).__name__.endswith(_SUFFIX)
    return model._modules.get(HEAD) if named else None


def task_type(model: nn.Module) -> str:
    """PEFT's word for what an adapter of this model is for."""
    return "CAUSAL_LM" if score_head(model) is None else SCORES


def is_saved_with_score(config: Any) -> bool:
    """A configuration file that says its weights are those of a sequence classifier."""
    named = config.get("architectures") if isinstance(config, dict) else config.architectures
    return any(str(name).endswith(_SUFFIX) for name in named or ())


def check_family(model_type: str, where: str) -> None:
    """ModelError where transformers has no causal decoder with a score head for this family."""
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if model_type not in known or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError("transformers has no score head for this family", where=where, value=model_type,
                         remedy="take a family that has one: llama, qwen2, qwen3, mistral, gemma2, gpt2")  # fmt: skip


def check_head(model: PreTrainedModel, where: str) -> None:
    """ModelError unless the head is one linear to one number, right after the decoder."""
    head = score_head(model)
    if type(head) is not nn.Linear or head.bias is not None:
        raise ModelError("the family's head is not one linear called score", where=where, value=type(model).__name__)
    if head.out_features != 1:
        raise ModelError("a reward model gives one score", where=f"{where}: num_labels", value=head.out_features,
                         remedy="pass a reward model, or a language model to make one from")  # fmt: skip


@torch.no_grad()
def start_head(model: PreTrainedModel, seed: int) -> None:
    """A new head, the same for the same seed whatever was drawn before."""
    weight: Any = model.get_submodule(HEAD).weight
    spread = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    drawn = torch.normal(0.0, spread, weight.shape, generator=torch.Generator().manual_seed(seed))
    weight.copy_(drawn.to(weight))


def settle_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stop_ids: Collection[int]) -> None:
    """Model and tokenizer agree on a padding token that never ends a row; none where the vocabulary has no such."""
    chosen = padding_of(tokenizer, stop_ids)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = chosen
    if chosen is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)


def padding_of(tokenizer: PreTrainedTokenizerFast, stop_ids: Collection[int]) -> int | None:
    """The tokenizer's own where it is no stop token, else a special token that no text and no template ends with."""
    used = str(tokenizer.chat_template or "")
    special = [
        place for place, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in used and place != tokenizer.bos_token_id
    ]  # fmt: skip
    candidates = [tokenizer.pad_token_id, *special, tokenizer.unk_token_id, tokenizer.bos_token_id]
    ends = {*stop_ids, tokenizer.eos_token_id}
    return next((place for place in candidates if place is not None and place not in ends), None)


def scores(head: nn.Module, hidden_QD: Tensor) -> Tensor:
    """float32 (Q,), in the head's own precision: bfloat16 would round scores of 4 to steps of 1/32."""
    weight: Any = head.weight
    with torch.autocast(hidden_QD.device.type, enabled=False):
        return head(hidden_QD.to(weight.dtype)).squeeze(-1).float()


def every_output(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """What the model says at every token, native: logits (B, T, V), or of a reward model scores (B, T, 1)."""
    head = score_head(model)
    if head is None:
        return model(input_ids=ids_BT).logits
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False)[0]  # type: ignore[operator]
    return scores(head, hidden_BTD)[..., None]


def as_causal(model: nn.Module) -> nn.Module:
    """The model itself, or for a reward model its decoder under a random language head of the same family."""
    if score_head(model) is None:
        return model
    config = _native_config(model)
    with torch.device("meta"):
        twin = causal_class(model)(config)
    setattr(twin, twin.base_model_prefix, model.base_model)
    parameter = next(model.base_model.parameters())  # type: ignore[operator,union-attr]
    for module in list(twin.modules()):
        if any(p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device=parameter.device, recurse=False).to(parameter.dtype)
            for own in module.parameters(recurse=False):
                nn.init.normal_(own, std=0.02)
    if (native := getattr(model, "luthier_native_attention", None)) is not None:
        twin.luthier_native_attention = native
    return twin.eval()


def causal_class(model: nn.Module) -> Any:
    """The class that a few-layer stand-in is made of: the model's own, for a reward model its language model's."""
    return type(model) if score_head(model) is None else MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]


def _native_config(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    native = getattr(model, "luthier_native_attention", None)
    if native is not None:
        config._attn_implementation_internal = native
    config.tie_word_embeddings = False
    return config
