"""Where the attention and the feed-forward block of each decoder layer are, found by running, not by names.

Two tokens go through the model under forest attention; each layer's attention is the child in which attention ran,
its feed-forward block the one other child that holds matrices. A layer that is built differently (a feed-forward of
loose linears, two of either) says so by an empty path, and methods that need the place refuse with the reason.
Paths are original ones (models/sites.py); ask before a method attaches its sites.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from luthier.contracts.batch import Forest
from luthier.contracts.errors import RecipeError
from luthier.models.attention import FOREST, forest_context, witnessed
from luthier.models.shapes import decoder_layers
from luthier.models.sites import innermost, original_name, switched_off
from luthier.models.switch import attention_as


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer. `attention`, `feed_forward`: paths of its children, "" where there is no single one."""

    path: str
    attention: str
    feed_forward: str
    attends: tuple[str, ...]  # the modules that call attention, deepest first


def blocks(model: nn.Module) -> list[Block]:
    """Of every decoder layer, in order; empty where the model has no list of layers."""
    _, layers = decoder_layers(model)
    ran = _attending(model)
    return [_block(model, path, ran) for path in layers]


def need(found: list[Block], part: str, method: str) -> list[tuple[Block, str]]:
    """(block, path of its `attention` or `feed_forward`) of every layer, or RecipeError where one has none."""
    lacking = [block.path for block in found if not getattr(block, part)]
    if lacking or not found:
        words = part.replace("_", "-")
        raise RecipeError(
            f"{method} goes after the {words} block of each layer, and this model has no single one there",
            where="method", value=", ".join(lacking[:3]) or "no list of layers",
            remedy="use a method on linears, such as lora",
        )  # fmt: skip
    return [(block, getattr(block, part)) for block in found]


def parts_of(model: nn.Module, part: str) -> list[nn.Module]:
    """The `attention` or `feed_forward` of each layer with the sites around it; empty where a layer has no single one.

    Unlike `blocks`, it may be asked after a method has attached its sites.
    """
    _, layers = decoder_layers(model)
    with switched_off(model):
        ran = _attending(model)
    found = [_parts(innermost(model.get_submodule(path)), ran) for path in layers]
    single = all(len(parts["attention"]) == len(parts[part]) == 1 for parts in found)
    return [parts[part][0] for parts in found] if single else []


def _parts(layer: nn.Module, ran: set[int]) -> dict[str, list[nn.Module]]:
    """The layer's children that hold matrices: those in which attention ran, and the others."""
    children = [child for child in layer.children() if any(p.ndim > 1 for p in child.parameters())]
    attention = [child for child in children if any(id(module) in ran for module in child.modules())]
    return {"attention": attention, "feed_forward": [child for child in children if child not in attention]}


def _block(model: nn.Module, path: str, ran: set[int]) -> Block:
    layer = model.get_submodule(path)
    attends = [name for name, module in layer.named_modules() if id(module) in ran]
    children = {name: child for name, child in layer.named_children() if any(p.ndim > 1 for p in child.parameters())}
    attention = [name for name in children if any(a == name or a.startswith(f"{name}.") for a in attends)]
    others = [name for name in children if name not in attention]
    full = [f"{original_name(path)}.{name}" for name in attends]
    one, other = (f"{path}.{names[0]}" if len(names) == 1 else "" for names in (attention, others))
    return Block(original_name(path), original_name(one), original_name(other), tuple(full))


@torch.no_grad()
def _attending(model: nn.Module) -> set[int]:
    """Identities of the modules whose attention ran."""
    place = next(model.parameters()).device
    devices = [place] if place.type == "cuda" else []
    forest = Forest((0,), (2,), (-1,))
    ids = torch.ones(1, 2, dtype=torch.int64, device=place)
    with torch.random.fork_rng(devices), attention_as(model, FOREST), forest_context(forest), witnessed() as seen:
        try:
            model(input_ids=ids, position_ids=torch.arange(2, device=place)[None], use_cache=False)
        except Exception:  # noqa: BLE001 a family that cannot run a forest: nothing is known of its layers
            return set()
    return set(seen)
