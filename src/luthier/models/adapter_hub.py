"""Names of bottleneck adapters in the `adapters` library (AdapterHub) and ours, each way: `to_hub`, `from_hub`.

    ours    base_model.model.model.layers.0.mlp.adapter_down.weight
    theirs  model.layers.0.output_adapters.adapters.NAME.adapter_down.0.weight

Pure functions of names; tensors have the same shapes on both sides. `PLACES` says, per family, at which child of a
layer an adapter of ours stands ("" the layer itself, Pfeiffer's `reads: stream`) and the library's word for that place.

The same weights mean the same there for `houlsby` (`DoubleSeqBnConfig`) and for `pfeiffer`, with `reads: stream`
(`SeqBnConfig`) and with `reads: block` (`SeqBnConfig(original_ln_before=False)`). They do not for `parallel_adapter` on
pre-norm decoders: the library's `ParBnConfig` reads the residual stream before the norm, ours the paper's normed row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from luthier.contracts.errors import ModelError
from luthier.models.peft_names import PREFIX

PLACES = {
    "llama": {"self_attn": "attention_adapters", "mlp": "output_adapters", "": "output_adapters"},
    "gpt2": {"attn": "attention_adapters", "mlp": "output_adapters", "": "output_adapters"},
}
_LEAVES = {"adapter_down.weight": "adapter_down.0.weight", "adapter_down.bias": "adapter_down.0.bias",
           "adapter_up.weight": "adapter_up.weight", "adapter_up.bias": "adapter_up.bias",
           "adapter_scaling": "scaling"}  # fmt: skip
_OURS = re.compile(r"(?P<layer>.*?\.\d+)\.(?:(?P<place>\w+)\.)?(?P<leaf>adapter_(?:up|down)\.\w+|adapter_scaling)$")
_THEIRS = re.compile(r"(?P<layer>.*?\.\d+)\.(?P<place>\w+_adapters)\.adapters\.(?P<name>[^.]+)\.(?P<leaf>.+)$")


def to_hub(names: Iterable[str], family: str, adapter: str) -> dict[str, str]:
    """Our name -> the library's, for an adapter called `adapter` there."""
    places, found = _places(family), {}
    for name in names:
        parts = _OURS.match(name.removeprefix(PREFIX))
        if parts is None or not name.startswith(PREFIX) or (place := parts["place"] or "") not in places:
            raise ModelError("no bottleneck adapter's tensor of this family", where=name, value=family)
        found[name] = f"{parts['layer']}.{places[place]}.adapters.{adapter}.{_LEAVES[parts['leaf']]}"
    return found


def from_hub(names: Iterable[str], family: str, *, reads: str = "block") -> dict[str, str]:
    """The library's name -> ours. `reads: stream`: what stands after the feed-forward block belongs to the layer."""
    back = {theirs: ours for ours, theirs in _places(family).items() if bool(ours) or reads == "stream"}
    leaves, found = {theirs: ours for ours, theirs in _LEAVES.items()}, {}
    for name in names:
        parts = _THEIRS.match(name)
        if parts is None or parts["place"] not in back or parts["leaf"] not in leaves:
            raise ModelError("no bottleneck adapter's tensor of the library", where=name, value=family)
        place = back[parts["place"]]
        found[name] = ".".join([f"{PREFIX}{parts['layer']}", *([place] if place else []), leaves[parts["leaf"]]])
    return found


def _places(family: str) -> dict[str, str]:
    if family not in PLACES:
        raise ModelError("no names of this family are known", value=family, remedy=f"known: {', '.join(PLACES)}")
    return PLACES[family]
