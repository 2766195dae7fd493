"""How a model's logits come from its decoder's hidden rows, found out in numbers.

    logits = softcap * tanh(scale * (h W^T + b) / softcap)

Scale and cap are guessed from the names that configurations use for them, the scale also fitted; a guess counts only
if it reproduces the model's own logits on hidden rows made large enough for a soft cap to show. Where none does, the
head cannot be told apart from the decoder and the whole model is run instead (models/trunk.py, head kind `model`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.models.logprobs import HeadMap
from luthier.models.sites import Site
from luthier.models.switch import native_attention

_TOLERANCE = 1e-5
_LOUD = 50.0


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The model without its head, or None where it has no such part."""
    if model.base_model is not model:
        return model.base_model  # type: ignore[return-value]
    parts = [child for child in model.children() if isinstance(_inside(child), PreTrainedModel)]
    return parts[0] if len(parts) == 1 else None


def _inside(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, Site) else module


def find_head_map(model: nn.Module, tokens_T: Tensor) -> HeadMap | None:
    """How logits come from the decoder's hidden rows: verified in numbers, None where no simple form fits."""
    head, decoder = model.get_output_embeddings(), decoder_of(model)
    if head is None or decoder is None:
        return None
    try:
        with torch.no_grad(), native_attention(model):
            hidden = decoder(input_ids=tokens_T[None], use_cache=False)[0]
            gain = _LOUD / head(hidden).abs().max().item()  # a soft cap shows only in large logits
            plain = head(hidden * gain).float()
            with _amplified(head, gain):
                logits = model(input_ids=tokens_T[None], use_cache=False).logits.float()
    except Exception:  # noqa: BLE001 a decoder that cannot be called alone: the whole model is
        return None
    if plain.shape != logits.shape:
        return None
    config = model.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None)
    scales = [1.0, 1.0 / divisor if divisor else None]
    scales += [getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    scales.append((plain * logits).sum().item() / plain.square().sum().item())
    for softcap in (None, getattr(config, "final_logit_softcapping", None)):
        for scale in scales:
            candidate = HeadMap(1.0 if scale is None else float(scale), softcap)
            if relative_difference(candidate.apply(plain), logits) <= _TOLERANCE:
                return candidate
    return None


@contextmanager
def _amplified(head: nn.Module, gain: float) -> Iterator[None]:
    """Within it the head receives hidden rows `gain` times as large."""
    handle = head.register_forward_pre_hook(lambda module, args: (args[0] * gain, *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """max|d| / max(1, max|expected|); infinite where anything is not a number."""
    off = ((found - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
    return off if off == off else float("inf")
