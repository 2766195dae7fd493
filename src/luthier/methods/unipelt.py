"""UniPELT: prefix, sequential adapter and LoRA in every layer, each behind a sigmoid gate that learns when to use it.

    attention      prefix keys and values times g_t, g_t = sigmoid(n_t . w + b)     n the block's input rows
    its linears    y = W x + g_t B A x              the gate stands where LoRA has alpha / r
    feed-forward   h + g_t (relu(h_t down^T + b) up^T + c), h the block's result

arXiv:2110.07577, defaults of its code: 10 virtual tokens, bottleneck 48, r 8. There a gate is one number per sequence,
the mean of sigmoid over all tokens, padding included. In a causal model that mean would let a token see later ones, so
every gate here is the token's own: a later token changes nothing before it (a test), packed is as alone, and a cache
stays valid. Where all tokens of a row have one gate, both are the same; the `adapters` library is the oracle there.
models/gated_prefix.py says exactly what a prefix behind a gate per query is.

When: little data and no idea which method suits it. Cost: three methods' weights, attention products twice as wide.
Starts: gates near one half, LoRA's B zero, the adapter N(0, 0.02^2), the prefix as in prefix tuning; so not the base.
Not mergeable. Files: our own type UNIPELT. Left out: gates per sequence, families that one of the parts refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.methods.houlsby import Dropout, Factor, Houlsby, Size, doc, width_of
from luthier.methods.mam import Mam, SiteAround
from luthier.methods.pfeiffer import Pfeiffer
from luthier.methods.prefix import PrefixTuning
from luthier.models.blocks import blocks, need
from luthier.models.gated_prefix import GatedAttention
from luthier.models.gates import Gate, GatedBottleneck, GatedLowRank
from luthier.models.low_rank import DTYPES
from luthier.models.sites import AdaptedLinear, AdaptedModule, Site, is_linear, named_sites, tied_to
from luthier.models.targets import Targets, base_modules, find_targets, shortest_names
from luthier.models.virtual_tokens import Count

ATTENTION = "attention"
Rank = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class UniPELT(Mam):
    """Prefix, adapter and LoRA at once, each with a gate per token: for little data; not mergeable."""

    paper: ClassVar[str] = "arXiv:2110.07577"
    peft_type: ClassVar[str | None] = "UNIPELT"
    default_learning_rate: ClassVar[float] = 1e-3

    num_virtual_tokens: Count = doc(10, "length of the prefix in every layer")
    encoder_hidden_size: Count = doc(512, "width inside that network")
    bottleneck_size: Size = doc(48, "width of the adapter after each feed-forward block")
    scaling: Factor | Literal["learned", "channel"] = doc(1.0, "factor on the adapter beside its gate")
    r: Rank = doc(8, "rank of the pairs beside the linears; nothing but the gate scales them")
    lora_dropout: Dropout = doc(0.0, "share of the pairs' input dropped in training")
    target_modules: str | tuple[str, ...] = doc(
        ATTENTION, "linears with a pair: attention (all of its block), all-linear, a list of names, or a regex on paths"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = {"r": type(self.r) is int and self.r >= 1, "lora_dropout": 0.0 <= self.lora_dropout < 1.0}
        for name, fine in checks.items():
            if not fine:
                raise RecipeError(f"{name} cannot be that", where=f"method.{name}", value=getattr(self, name),
                                  remedy=self.__dataclass_fields__[name].metadata["doc"])  # fmt: skip

    def parts(self) -> tuple[PrefixTuning, Houlsby]:
        prefix, _ = super().parts()
        adapter = Pfeiffer(
            bottleneck_size=self.bottleneck_size, non_linearity=self.non_linearity, scaling=self.scaling,
            dropout=self.dropout, init_weights="bert", adapter_dtype=self.adapter_dtype,
        )  # fmt: skip
        return prefix, adapter

    def places(self, model: nn.Module) -> dict[str, SiteAround]:
        width, found = width_of(model), blocks(model)
        attention = [path for _, path in need(found, "attention", self.kind)]
        feed_forward = [path for _, path in need(found, "feed_forward", self.kind)]
        _, adapter = self.parts()

        def paired(base: nn.Module) -> Site:
            pair = GatedLowRank(self.r)
            pair.dropout = self.lora_dropout
            pair.make(base, DTYPES[self.adapter_dtype], bias=False, init=True)
            return AdaptedLinear(base, pair)

        def gated(base: nn.Module) -> Site:
            return GatedAttention(base, Gate(width, self.like(base)))

        def beside(base: nn.Module) -> Site:
            made = GatedBottleneck(reads="output", non_linearity=self.non_linearity, dropout=self.dropout)
            made.make(width, adapter.size(width), init="bert", scaling=self.scaling, like=self.like(base))
            return AdaptedModule(base, made)

        return {
            **dict.fromkeys(self._linears(model, attention), paired),
            **dict.fromkeys(attention, gated), **dict.fromkeys(feed_forward, beside),
        }  # fmt: skip

    def config(self, model: nn.Module) -> dict[str, Any]:
        """Targets are written as names, so that every reader selects the same modules."""
        linears = [path for path, site in named_sites(model) if isinstance(site, AdaptedLinear)]
        return {**super().config(model), "target_modules": shortest_names(model, linears)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UniPELT:
        if "target_modules" not in config:
            raise RecipeError("the adapter does not say which linears it has", where="target_modules",
                              remedy="its adapter_config.json is damaged")  # fmt: skip
        made = super().from_config(config)
        assert isinstance(made, cls)
        return made

    def _linears(self, model: nn.Module, attention: list[str]) -> list[str]:
        """Paths of the linears that get a pair."""
        wanted = self.target_modules
        if wanted == ATTENTION:
            modules = base_modules(model)
            inside = tuple(f"{path}." for path in attention)
            wanted = tuple(path for path, m in modules.items() if path.startswith(inside) and is_linear(m))
        found = find_targets(model, Targets(target_modules=wanted, modules_to_save=self.saved(model)))
        for path, module in found.items():
            others = tied_to(model, path)
            if others or not is_linear(module):
                why = f"shares its weight with {', '.join(others)}" if others else "is an embedding"
                raise RecipeError(f"{path} {why}: no pair goes there", where="method.target_modules", value=path,
                                  remedy="leave it out")  # fmt: skip
        return list(found)
