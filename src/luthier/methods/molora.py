"""MoLoRA: a mixture of low-rank experts beside frozen linears; a router chooses K of E for each token.

    p = softmax(W_r h) (fp32)    g = the K largest of p over their sum    y = W x + b + s sum_e g_e B_e A_e x
    A_e (r, in), B_e (out, r), W_r (E, width), s = alpha / r

router_scope block (MixLoRA, arXiv:2404.15159): one router per feed-forward block reads the block's input, experts on
the linears inside, plain LoRA on every other target. linear (MoLoRA, arXiv:2309.05444, whose soft mixture is top_k =
num_experts): a router at each target.
A_e starts as LoRA's, B_e zero, W_r N(0, 0.02^2): the model starts as the base, and one expert is LoRA exactly.

Use it for mixed data (several tasks or languages) where one pair of that rank is too narrow. It costs E r (in + out)
weights a linear, E products with A and B where LoRA has one (they are single products, models/expert_mixture.py), and
no more tokens through the base. Balance and z-loss keep experts in use: over the whole step, each token as often as
paths go through it, averaged over routers so that the coefficient does not depend on depth; their gradient takes the
load of the step before (models/routed.py says why). While it trains, the last layer computes every row.

Cannot be merged: what is added depends on the token. Files are our own; `export` writes each expert as a PEFT LORA
adapter. Left out: experts on 3-D parameters or in lists (families that are mixtures themselves: a router there would
see some tokens only), on embeddings and, with scope linear, on the head; capacity limits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.contracts.method import Method
from luthier.methods.lora import Alpha, Dropout, LoRA, Rank
from luthier.models import peft_names
from luthier.models.blocks import blocks
from luthier.models.last_layer import EVERY_ROW
from luthier.models.replace import replace_directory
from luthier.models.routed import Experts, Given, RoutedBlock, Router, routers
from luthier.models.score_head import HEAD, score_head
from luthier.models.shapes import decoder_layers, output_head
from luthier.models.shared_input import share_inputs
from luthier.models.sites import (
    AdaptedLinear,
    SavedModule,
    freeze,
    named_sites,
    replace,
    sites,
    switched_off,
    tied_to,
)
from luthier.models.targets import ALL_LINEAR, Targets, check_targets, find_saved, find_targets, shortest_names

Count = Annotated[int, Field(ge=1)]
Coefficient = Annotated[float, Field(ge=0)]
_EXPERT = "expert_{}"
_ROUTERS = "router.safetensors"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 4096


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e6


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class MoLoRA(Method):
    """Several low-rank experts beside each linear, chosen token by token: for mixed data, not to be merged."""

    paper: ClassVar[str] = "arXiv:2404.15159"
    mergeable: ClassVar[bool] = False
    peft_type: ClassVar[str | None] = "MOLORA"
    default_learning_rate: ClassVar[float] = 2e-4
    config_keys: ClassVar[Mapping[str, Any]] = {
        "num_experts": (_is_count, "a whole number from 1 to 4096"),
        "top_k": (_is_count, "a whole number from 1 to 4096"),
        "router_scope": (lambda v: v in ("block", "linear"), "block or linear"),
        "norm_topk_prob": (lambda v: isinstance(v, bool), "true or false"),
        "router_aux_loss_coef": (_is_share, "a number from 0"),
        "router_z_loss_coef": (_is_share, "a number from 0"),
        "router_jitter_noise": (lambda v: _is_share(v) and v < 1, "a number from 0 to below 1"),
    }

    num_experts: Count = _doc(8, "experts beside each linear")
    top_k: Count = _doc(2, "experts that a token goes through")
    r: Rank = _doc(8, "rank of each expert")
    lora_alpha: Alpha | None = _doc(None, "scale numerator; an expert is multiplied by lora_alpha / r; default 2 r")
    lora_dropout: Dropout = _doc(0.0, "share of the experts' input dropped in training; the router sees all of it")
    target_modules: str | tuple[str, ...] = _doc(ALL_LINEAR, "all-linear, a list of module names, or a regex on paths")
    exclude_modules: str | tuple[str, ...] | None = _doc(None, "modules left alone: list of names, or a regex on paths")
    router_scope: Literal["block", "linear"] = _doc(
        "block", "block: a router per feed-forward block, plain LoRA elsewhere; linear: a router at each target"
    )
    norm_topk_prob: bool = _doc(True, "divide the gates of the chosen by their sum; false with top_k 1")
    router_aux_loss_coef: Coefficient = _doc(0.01, "weight of the balance loss; 0.001-0.02 is usual, 0: none")
    router_z_loss_coef: Coefficient = _doc(0.001, "weight of mean(logsumexp^2), which keeps logits small; 0: none")
    router_jitter_noise: Dropout = _doc(0.0, "in training the router's input is multiplied by U(1 - this, 1 + this)")

    def __post_init__(self) -> None:
        for spec in fields(self):
            if isinstance(value := getattr(self, spec.name), (list, set)):
                object.__setattr__(self, spec.name, tuple(sorted(value) if isinstance(value, set) else value))
        checks = {
            "num_experts": _is_count(self.num_experts),
            "top_k": _is_count(self.top_k) and self.top_k <= self.num_experts,
            "r": _is_count(self.r),
            "lora_alpha": self.lora_alpha is None or self.lora_alpha > 0,
            "lora_dropout": 0 <= self.lora_dropout < 1,
            "router_scope": self.router_scope in ("block", "linear"),
            "router_aux_loss_coef": _is_share(self.router_aux_loss_coef),
            "router_z_loss_coef": _is_share(self.router_z_loss_coef),
            "router_jitter_noise": 0 <= self.router_jitter_noise < 1,
        }
        docs = {spec.name: spec.metadata["doc"] for spec in fields(self)}
        for name, fine in checks.items():
            if not fine:
                remedy = f"at most num_experts ({self.num_experts})" if name == "top_k" else docs[name]
                raise RecipeError(f"{name} cannot be that", where=f"method.{name}", value=getattr(self, name),
                                  remedy=remedy)  # fmt: skip
        if self.top_k == 1 < self.num_experts and self.norm_topk_prob:
            raise RecipeError("one gate divided by itself is 1 whatever the router says, so it would learn nothing",
                              where="method.norm_topk_prob", value=True,
                              remedy="set norm_topk_prob: false, or top_k: 2")  # fmt: skip

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or 2 r where the recipe leaves it open."""
        return 2.0 * self.r if self.lora_alpha is None else self.lora_alpha

    def plain(self, **more: Any) -> LoRA:
        """What stands where no expert does, and what one expert alone is."""
        return LoRA(r=self.r, lora_alpha=self.alpha, lora_dropout=self.lora_dropout, **more)

    def targets(self, model: nn.Module) -> Targets:
        saved = () if score_head(model) is None else (HEAD,)
        return Targets(
            target_modules=self.target_modules, exclude_modules=self.exclude_modules, modules_to_save=saved
        )  # fmt: skip

    def check(self, model: nn.Module) -> None:
        check_targets(model, self.targets(model), {})

    def attach(self, model: nn.Module) -> None:
        if sites(model):
            raise RecipeError("the model already carries an adapter", where="method", remedy="merge or detach it first")
        targets = self.targets(model)
        found, saved = find_targets(model, targets), find_saved(model, targets.modules_to_save)
        self._refuse(model, found)
        of = self._block_of(model, found) if self.router_scope == "block" else {}
        given = {path: Given() for path in of.values()}
        freeze(model)
        for path, base in found.items():
            replace(model, path, AdaptedLinear(base, self._delta(path, base, given.get(of.get(path, "")))))
        for path, gates in given.items():
            block = model.get_submodule(path)
            width: int = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
            replace(model, path, RoutedBlock(block, self._router(width, block), gates))
        for path, base in saved.items():
            replace(model, path, SavedModule(base))
        for router in (all_routers := routers(model)):
            router.balance_coefficient = self.router_aux_loss_coef / len(all_routers)
            router.z_coefficient = self.router_z_loss_coef / len(all_routers)
        share_inputs(model)

    def _delta(self, path: str, base: nn.Module, given: Given | None) -> nn.Module:
        if self.router_scope == "block" and given is None:
            return self.plain().delta(path, base)
        width = AdaptedLinear(base, nn.Identity()).in_features
        made = Experts(base, self.num_experts, self.r, given or self._router(width, base))
        made.scale, made.dropout = self.alpha / self.r, self.lora_dropout
        return made

    def _router(self, width: int, beside: nn.Module) -> Router:
        made = Router(width, self.num_experts, self.top_k, next(beside.parameters()).device)
        made.renormalise, made.jitter = self.norm_topk_prob, self.router_jitter_noise
        return made

    def _refuse(self, model: nn.Module, found: Mapping[str, nn.Module]) -> None:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        layers, head = decoder_layers(model)[1], output_head(model)
        inner = [f"{name}." for name in lists if any(name.startswith(f"{layer}.") for layer in layers)]
        for path, base in found.items():
            reason = ""
            if isinstance(base, nn.Embedding):
                reason = "an embedding looks up ids: there is no input for a router"
            elif base is head and self.router_scope == "linear":
                reason = "the head is given scored tokens only, and a router must see them all"
            elif any(path.startswith(prefix) for prefix in inner):
                reason = "it is one of a list inside its layer, which only some tokens reach"
            elif others := tied_to(model, path):
                reason = f"it shares its weight with {', '.join(others)}, which would be silently untied"
            if reason:
                raise RecipeError(f"no expert can stand beside this module: {reason}", where="method.target_modules",
                                  value=path, remedy="leave it out (method.exclude_modules), or use lora")  # fmt: skip

    def _block_of(self, model: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, str]:
        """Target -> its feed-forward block, of the targets that lie in one; RecipeError where there is none."""
        of: dict[str, str] = {}
        layers, targets = blocks(model), self.targets(model)
        for layer in layers:
            block, reason = layer.feed_forward, "is not one module"
            if block and targets.excludes(block):
                continue
            if block and any(p.ndim > 2 for p in model.get_submodule(block).parameters()):
                reason, block = "keeps its weights as experts of its own, in 3-D parameters that are no linears", ""
            if not block:
                raise RecipeError(f"the feed-forward block of {layer.path} {reason}", where="method.router_scope",
                                  value="block", remedy="use router_scope: linear, or method: lora")  # fmt: skip
            of |= {path: block for path in found if path.startswith(f"{block}.")}
        if not of:
            known = "no target lies in a feed-forward block" if layers else "this model has no feed-forward blocks"
            raise RecipeError(known, where="method.target_modules", value=self.target_modules,
                              remedy="use router_scope: linear, or method: lora")  # fmt: skip
        return of

    def begin_step(self, model: nn.Module, microbatches: Sequence[Batch]) -> None:
        tokens = sum(batch.forest.path_tokens for batch in microbatches)
        for router in routers(model):
            router.begin(float(tokens))
        setattr(model, EVERY_ROW, True)

    def penalty(self, model: nn.Module) -> Tensor | float:
        """The step's balance and z-loss as a number: their gradients are in already (models/routed.py)."""
        told = self.router_aux_loss_coef or self.router_z_loss_coef
        open_now = [router.loss() for router in routers(model) if router.tokens is not None]
        return torch.stack(open_now).sum() if told and open_now else 0.0

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        with torch.no_grad():
            for router in routers(model):
                router.end()
        setattr(model, EVERY_ROW, False)

    def least_load(self, model: nn.Module) -> float:
        """Of the last step, the least used expert's tokens over an even share: 1 is even, 0 an expert left alone."""
        return min(float(router.load_E.min()) * self.num_experts / self.top_k for router in routers(model))

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        raise NotMergeable(
            "what a mixture adds depends on the token, so no one matrix can hold it", where="method",
            remedy="serve the adapter beside its base, or take one expert alone (MoLoRA.export)",
        )  # fmt: skip

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return peft_names.collect(model)

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        peft_names.restore(model, tensors)

    def config(self, model: nn.Module) -> dict[str, Any]:
        """LoRA's keys and our own; targets by name, whatever the recipe said, so that every reader finds the same."""
        own = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name in self.config_keys}
        return {**self._as_lora(model), **own, "peft_type": "MOLORA"}

    def _as_lora(self, model: nn.Module) -> dict[str, Any]:
        paths = [path for path, site in named_sites(model) if isinstance(site, AdaptedLinear)]
        return self.plain(target_modules=tuple(shortest_names(model, paths))).config(model)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MoLoRA:
        """Inverse of `config`."""
        names = {spec.name for spec in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in names and value is not None})

    def export(self, model: nn.Module, directory: str | Path, base_path: str) -> list[Path]:
        """`expert_0`, ...: what a token gets whose gate is 1 there and 0 elsewhere, plain LoRA and all, each a PEFT
        LORA adapter; the routers beside them in `router.safetensors`. Returns the experts' directories."""
        directory, everything = Path(directory), self.tensors(model)
        config = {**self._as_lora(model), "base_model_name_or_path": base_path, "inference_mode": True}
        routing = {name: tensor for name, tensor in everything.items() if ".lora_router." in name}
        with replace_directory(directory) as fresh:
            for expert in range(self.num_experts):
                (fresh / _EXPERT.format(expert)).mkdir()
                text = json.dumps(config, indent=2, sort_keys=True) + "\n"
                (fresh / _EXPERT.format(expert) / "adapter_config.json").write_text(text, encoding="utf-8")
                own = {_alone(name, expert): tensor for name, tensor in everything.items() if name not in routing}
                own.pop("", None)
                save_file(own, fresh / _EXPERT.format(expert) / "adapter_model.safetensors", metadata={"format": "pt"})
            save_file(routing, fresh / _ROUTERS, metadata={"format": "pt"})
        return [directory / _EXPERT.format(expert) for expert in range(self.num_experts)]


def _alone(name: str, expert: int) -> str:
    """A tensor's name in the file of one expert alone; empty where it is another expert's."""
    stem, _, number = name.removesuffix(".weight").rpartition(".")
    if not stem.endswith((".lora_A", ".lora_B")):
        return name
    return f"{stem}.weight" if int(number) == expert else ""
