"""A model from its files straight into a storage format: each matrix is packed as it is read, one after the other.

transformers reads and names the tensors (every family's renamings with it) and asks a quantizer about each; ours is
registered there under a name of its own. A linear of the body is replaced by its packed form the moment its weight has
been read, and the weight is let go: at no time is there more than the packed part of the model, what stays dense, and
one matrix. Afterwards nothing of that machinery is left on the model: its configuration is that of the dense one.

A method whose start reads the weight sees each matrix just before it is packed (models/packed_starts.py).

A checkpoint that is packed already (bitsandbytes, GPTQ, AWQ) is taken as it is, codes and scales to the bit
(models/stored_files.py). Left out: several devices, offload to disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from luthier.contracts.errors import ModelError
from luthier.models.packed_starts import Before
from luthier.models.quantise import packed, quantisable
from luthier.models.sites import features, is_linear, replace
from luthier.models.weights.packed import Packed

_NAME = "luthier"
Stored = Mapping[str, Callable[[nn.Module], Packed]]  # path of a linear -> what makes it of the files


@dataclass(frozen=True)
class Wanted:
    """The format, and the linears that the files keep packed already."""

    format: str
    double: bool = True
    stored: Stored | None = None
    before: Callable[[nn.Module], Before | None] | None = (
        None  # of the model without weights -> what a method does first
    )


@register_quantization_config(_NAME)
class _Config(QuantizationConfigMixin):
    """What `from_pretrained` hands to the quantizer; it never reaches a file."""

    def __init__(self, wanted: Wanted | None = None) -> None:
        self.quant_method = _NAME  # type: ignore[assignment]
        self.wanted = wanted

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _NAME}


@register_quantizer(_NAME)
class _Quantizer(HfQuantizer):
    """Packs each linear when its weight arrives."""

    def __init__(self, quantization_config: _Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        assert quantization_config.wanted is not None
        self.wanted = quantization_config.wanted
        self.targets: set[str] = set()
        self.before: Before | None = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        stored = self.wanted.stored
        if stored is None:
            self.targets = {f"{path}.weight" for path in quantisable(model)}
            self.before = None if self.wanted.before is None else self.wanted.before(model)
        for path in stored or ():
            replace(model, path, _Awaited(_linear(model, path)))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for path, make in (self.wanted.stored or {}).items():
            awaited = model.get_submodule(path)
            replace(model, path, make(awaited).train(awaited.training))
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def _linear(model: nn.Module, path: str) -> nn.Module:
    """The linear that the files keep packed; ModelError where the model has none there."""
    try:
        found = model.get_submodule(path)
    except AttributeError:
        found = None
    if found is None or not is_linear(found):
        raise ModelError("the files keep a linear packed that this model has no place for", where=path,
                         remedy="a family that keeps its experts in one tensor needs the dense model")  # fmt: skip
    return found


class _Awaited(nn.Module):
    """Stands for a linear whose packed weight comes last: only its bias is read by transformers."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = type(linear)
        self.in_features, self.out_features = features(linear)
        self.register_parameter("bias", linear.bias)
        self.weight = torch.empty(0)  # no parameter: what a family's own initialisation finds, and leaves alone
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]


class _Pack(ConversionOps):
    """{name: weight} -> {}: the module is replaced, and nothing is left for transformers to set."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, model: Any = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        wanted = self.quantizer.wanted
        for name in list(input_dict):
            value = input_dict.pop(name)
            weight = value[0] if isinstance(value, list) else value
            path = name.removesuffix(".weight")
            linear = model.get_submodule(path)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            before = self.quantizer.before
            start = None if before is None else partial(before, path)
            made = packed(linear, wanted.format, double=wanted.double, start=start)
            linear.weight = None
            for part in (made, *made.parameters(), *made.buffers()):
                part._is_hf_initialized = True  # type: ignore[attr-defined]
            replace(model, path, made)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


@contextmanager
def quantizer_for(wanted: Wanted | None, config: Any) -> Iterator[dict[str, Any]]:
    """Arguments of `from_pretrained` for this format; the configuration is as before afterwards."""
    if wanted is None:
        yield {}
        return
    try:
        yield {"quantization_config": _Config(wanted)}
    finally:
        forget(config)


def forget(config: Any) -> None:
    """No trace of a quantizer in a configuration that will be saved."""
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "_is_quantized"):
            if name in part.__dict__:
                delattr(part, name)


def _own(model: nn.Module) -> None:
    """What is a piece of a mapped file gets memory of its own, so that the file, mostly dense matrices, is let go."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.untyped_storage().resizable():  # memory that no allocator of torch gave
            tensor.data = tensor.data.clone()


def release(model: Any) -> None:
    """The model as transformers gives it, without its quantizer: a plain model that has packed linears."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        _own(model)
    forget(model.config)
    for name in ("is_quantized", "quantization_method"):
        if name in model.__dict__:
            delattr(model, name)
