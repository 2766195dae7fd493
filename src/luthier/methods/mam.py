"""MAM adapter ("mix and match"): prefix tuning in the attention, a scaled parallel adapter beside the feed-forward.

    Attn(n W_Q, [P_K; n W_K], [P_V; n W_V])              P of num_virtual_tokens, by a network of tanh while it trains
    FFN(n) + s (relu(n down^T + b) up^T + c)             down (R, D), up (D, R), s = 4

arXiv:2110.04366: the paper's best of each place, a short prefix where few weights suffice and a wide adapter where many
pay. Defaults are the paper's: 30 virtual tokens, a network 800 wide, a bottleneck of 512. Each part is exactly its own
method: methods/prefix.py (keys without rotary, positions after the prefix) and methods/parallel_adapter.py (reads the
block's normed input, starts at nothing added); a test holds the sum to each alone.

When: to reproduce the paper, or over a quantised base. Cost: both parts'. Neither part is mergeable. Files: our own
type MAM, the prefix as PEFT has it (`prompt_embeddings`), the adapters as in BOTTLENECK_ADAPTER. Left out: what either
part leaves out; families that one of them refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.contracts.method import Method
from luthier.methods.houlsby import Dropout, Factor, Houlsby, NonLinearity, Size, check_saved, doc, width_of
from luthier.methods.parallel_adapter import ParallelAdapter
from luthier.methods.prefix import PrefixTuning
from luthier.models import peft_names
from luthier.models.decoder_site import DecoderSite
from luthier.models.low_rank import DTYPES
from luthier.models.prefix_site import attach_prefix, prefix_shape
from luthier.models.score_head import HEAD, PEFT_HEADS, SCORES, score_head, task_type
from luthier.models.shapes import max_positions
from luthier.models.sites import AdaptedModule, SavedModule, Site, detach, freeze, locate, replace, sites, switched_off
from luthier.models.targets import find_saved
from luthier.models.virtual_tokens import EMBEDDINGS, Count, VirtualTokens

SiteAround = Callable[[nn.Module], Site]


@dataclass(frozen=True, kw_only=True)
class Mam(Method):
    """A short prefix and a wide parallel adapter together, each where its paper found it best; not mergeable."""

    paper: ClassVar[str] = "arXiv:2110.04366"
    peft_type: ClassVar[str | None] = "MAM"
    default_learning_rate: ClassVar[float] = 1e-3
    starts_elsewhere: ClassVar[str] = PrefixTuning.starts_elsewhere
    config_keys: ClassVar[Mapping[str, Any]] = {
        name: check
        for name, check in {**PrefixTuning.config_keys, **Houlsby.config_keys}.items()
        if name not in ("init_weights", "reads", "train_norms", "adapter_kind")
    }

    num_virtual_tokens: Count = doc(30, "length of the prefix in every layer")
    prefix_projection: bool = doc(True, "let the prefix come out of a network while it trains")
    encoder_hidden_size: Count = doc(800, "width inside that network")
    bottleneck_size: Size = doc(512, "width of the adapter beside each feed-forward block")
    non_linearity: NonLinearity = doc("relu", "of the adapter: relu, gelu, gelu_new, swish, silu, tanh, leakyrelu")
    scaling: Factor | Literal["learned", "channel"] = doc(4.0, "factor on what the adapter adds, or what of it trains")
    dropout: Dropout = doc(0.0, "share of what the adapter adds dropped in training")
    modules_to_save: tuple[str, ...] = doc((), "modules trained and saved as full copies, e.g. a new lm_head")
    adapter_dtype: Literal["fp32", "bf16"] = doc("fp32", "dtype of the adapter's weights; the prefix is fp32")

    def __post_init__(self) -> None:
        for spec in fields(self):
            if isinstance(value := getattr(self, spec.name), (list, set)):
                object.__setattr__(self, spec.name, tuple(sorted(value) if isinstance(value, set) else value))
        self.parts()

    def parts(self) -> tuple[PrefixTuning, Houlsby]:
        """The two methods that this one is; each checks its own fields."""
        prefix = PrefixTuning(
            num_virtual_tokens=self.num_virtual_tokens, prefix_projection=self.prefix_projection,
            encoder_hidden_size=self.encoder_hidden_size,
        )  # fmt: skip
        adapter = ParallelAdapter(
            bottleneck_size=self.bottleneck_size, non_linearity=self.non_linearity, scaling=self.scaling,
            dropout=self.dropout, adapter_dtype=self.adapter_dtype,
        )  # fmt: skip
        return prefix, adapter

    @property
    def kind(self) -> str:
        """The name of the method, as recipes say it."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def first_position(self) -> int:  # type: ignore[override]
        return self.num_virtual_tokens

    def saved(self, model: nn.Module) -> tuple[str, ...]:
        """`modules_to_save`, and the score head of a reward model: it starts at random, so it trains whole."""
        own = self.modules_to_save
        return own if score_head(model) is None or HEAD in own else (*own, HEAD)

    def attach(self, model: nn.Module) -> None:
        if sites(model):
            raise RecipeError("the model already carries an adapter", where="method", remedy="merge or detach it first")
        most = max_positions(model.config)
        if most is not None and self.num_virtual_tokens >= most:
            raise RecipeError("virtual tokens leave no position for a row", where="method.num_virtual_tokens",
                              value=self.num_virtual_tokens,
                              remedy=f"the model has {most} positions: take far fewer")  # fmt: skip
        prefix, _ = self.parts()
        places, saved = self.places(model), find_saved(model, self.saved(model))
        check_saved(model, list(saved), list(places))
        shape = prefix_shape(model, self.kind)
        encoder = prefix.encoder(shape, next(model.parameters()).device)
        freeze(model)
        try:
            for path, base in saved.items():
                replace(model, path, SavedModule(base))
            for path, site_around in places.items():
                present = locate(model, path)
                replace(model, present, site_around(model.get_submodule(present)))
            attach_prefix(model, encoder, shape, self.kind)
        except BaseException:
            detach(model)
            raise

    def places(self, model: nn.Module) -> dict[str, SiteAround]:
        """Original path of each module that gets a site -> the site around it; what lies inside another comes first."""
        _, adapter = self.parts()
        width = width_of(model)

        def beside(base: nn.Module) -> Site:
            return AdaptedModule(base, adapter.delta(width, self.like(base)))

        return dict.fromkeys(adapter.places(model), beside)

    def like(self, base: nn.Module) -> Tensor:
        """An empty tensor where the base is, of the adapter's dtype."""
        return next(base.parameters()).new_empty(0, dtype=DTYPES[self.adapter_dtype])

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        raise NotMergeable(
            f"{self.kind} adds keys that no token has and a non-linear adapter: no weight of the base equals them",
            where="method", remedy="serve it as an adapter, or train lora, which merges",
        )  # fmt: skip

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        flat = _virtual(model)().detach().to("cpu", copy=True).contiguous()
        return {EMBEDDINGS: flat, **peft_names.collect(model)}

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        virtual, others = _virtual(model), peft_names.live(model)
        with torch.no_grad():
            peft_names.check_names({EMBEDDINGS: virtual(), **others}, tensors)
        peft_names.restore(model, {name: tensors[name] for name in others})
        virtual.settle(tensors[EMBEDDINGS])

    def config(self, model: nn.Module) -> dict[str, Any]:
        """Our own keys, named as in the files of the parts."""
        own = {spec.name: _plain(getattr(self, spec.name)) for spec in fields(self)}
        saved = list(self.saved(model)) or None
        return {"peft_type": self.peft_type, "task_type": task_type(model), **own, "modules_to_save": saved}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Mam:
        known = {spec.name: config[spec.name] for spec in fields(cls) if config.get(spec.name) is not None}
        if "num_virtual_tokens" not in known:
            raise RecipeError("the adapter does not say how many virtual tokens it has", where="num_virtual_tokens",
                              remedy="keep luthier.json beside the adapter's files")  # fmt: skip
        if config.get("task_type") == SCORES:
            known["modules_to_save"] = tuple(m for m in known.get("modules_to_save", ()) if m not in PEFT_HEADS)
        return cls(**known)


def _virtual(model: nn.Module) -> VirtualTokens:
    site = next(site for site in sites(model) if isinstance(site, DecoderSite))
    assert isinstance(site.delta, VirtualTokens)
    return site.delta


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
