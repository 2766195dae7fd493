"""LoRA-XS: y = W x + b + s B R A dropout(x), only the small square R (r, r) trains; s = lora_alpha / r.

    W is near U S V^T, its r leading singular triplets:   A = S V^T (r, in)    B = U (out, r)    both frozen

arXiv:2405.17604. The base stays as it is; W is read once, when the method attaches, or before it is packed where the
base is quantised (models/packed_starts.py).
The decomposition is deterministic, signs settled (models/truncated_svd.py); A and B are kept in files and checkpoints
all the same, because singular vectors of nearly equal values are not the same everywhere.

When: very many adapters, or very little to learn: r^2 numbers for each linear, whatever its size (57,344 for all seven
of a Llama 7B at r 16). Wants a high learning rate. Cannot: learn what lies outside the leading directions of W.
R starts as zero: its gradient is not zero, since A and B are not, and the model starts exactly as the base; the paper
draws N(0, 1e-5^2), which is `init_std: 1e-5`.

PEFT has no such type, so the file has its own (`LORA_XS`: lora_xs_A, lora_xs_B, lora_xs_R). `as_lora` gives the same
function as a plain LoRA (A, B R) with PEFT's names, as large as any LoRA of that rank. Left out: embeddings, `bias`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.methods.lora import LoRA
from luthier.models import peft_names
from luthier.models.adapting import (
    adapt,
    check_narrowing,
    fold_linears,
    known_fields,
    layers,
    saved_with_head,
    settle,
    where,
)
from luthier.models.low_rank import low_rank
from luthier.models.packed_starts import Before, Begun, Rounded
from luthier.models.sites import AdaptedLinear, Site, features, named_sites, switched_off
from luthier.models.targets import ALL_LINEAR, Targets, check_targets, find_targets
from luthier.models.truncated_svd import truncated_svd
from luthier.models.weights import is_dense, is_packed


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


def _factors(weight_OD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B): the leading singular vectors, the values on A's side."""
    u, s, v = truncated_svd(weight_OD, rank)
    return s[:, None] * v, u


class Core(nn.Module):
    """R between two frozen factors. Buffers lora_xs_A (r, in), lora_xs_B (out, r); parameter lora_xs_R (r, r)."""

    lora_xs_A: Tensor
    lora_xs_B: Tensor

    def __init__(self, a_RD: Tensor, b_OR: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.register_buffer("lora_xs_A", a_RD)
        self.register_buffer("lora_xs_B", b_OR)
        self.lora_xs_R = nn.Parameter(torch.zeros(len(a_RD), len(a_RD), device=a_RD.device))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """The pair (R, B) on z = A x: the backward never makes anything larger than (T, r) but dx."""
        dropped = functional.dropout(x, self.dropout) if self.training and self.dropout else x
        own = dropped if torch.is_autocast_enabled(x.device.type) else dropped.to(self.lora_xs_R.dtype)
        z = functional.linear(own, self.lora_xs_A)
        return low_rank(y, z, self.lora_xs_R, self.lora_xs_B, self.scale)

    def right(self) -> Tensor:
        """B R, (out, r), fp32: what stands as lora_B in the plain LoRA."""
        return self.lora_xs_B.float() @ self.lora_xs_R.detach().float()

    def weight(self) -> Tensor:
        """s B R A, (out, in), fp32."""
        return self.scale * (self.right() @ self.lora_xs_A.float())

    def peft_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("lora_xs_A", "lora_xs_B", "lora_xs_R")}


@dataclass(frozen=True, kw_only=True)
class LoRAXS(Method):
    """A trained r x r core between the frozen leading singular vectors of every weight."""

    paper: ClassVar[str] = "arXiv:2405.17604"
    mergeable: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "LORA_XS"
    default_learning_rate: ClassVar[float] = 2e-3
    config_keys: ClassVar[Mapping[str, Any]] = {
        "init_std": (lambda v: isinstance(v, (int, float)) and 0 <= v <= 1, "a number from 0 to 1"),
        "factors": (lambda v: v in ("svd", "file"), "svd or file"),
    }

    r: Annotated[int, Field(ge=1)] = _doc(16, "side of the trained square: 4 to 64, more for harder tasks")
    lora_alpha: Annotated[float, Field(gt=0)] = _doc(16, "scale numerator; the update is multiplied by lora_alpha / r")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = _doc(0.0, "share of the adapter's input dropped in training")
    init_std: Annotated[float, Field(ge=0, le=1)] = _doc(0.0, "spread of R at the start; the paper has 1e-5")
    factors: Literal["svd", "file"] = _doc("svd", "svd: of the weights; file: zero until an adapter's tensors come")
    target_modules: str | tuple[str, ...] = _doc(ALL_LINEAR, "all-linear, a list of module names, or a regex on paths")
    exclude_modules: str | tuple[str, ...] | None = _doc(None, "modules left alone: list of names, or a regex on paths")
    layers_to_transform: int | tuple[int, ...] | None = _doc(None, "only these layer numbers")
    layers_pattern: str | tuple[str, ...] | None = _doc(None, "name of the layer list, where it is not found by itself")
    modules_to_save: tuple[str, ...] = _doc((), "modules trained and saved as full copies, e.g. a new lm_head")

    def __post_init__(self) -> None:
        settle(self, {
            "r": type(self.r) is int and self.r >= 1, "lora_alpha": self.lora_alpha > 0,
            "lora_dropout": 0 <= self.lora_dropout < 1, "init_std": 0 <= self.init_std <= 1,
            "factors": self.factors in ("svd", "file"),
        })  # fmt: skip
        check_narrowing(self._targets(self.modules_to_save))

    def _targets(self, saved: tuple[str, ...]) -> Targets:
        return Targets(
            target_modules=self.target_modules, exclude_modules=self.exclude_modules, modules_to_save=saved,
            layers_to_transform=self.layers_to_transform, layers_pattern=self.layers_pattern,
        )  # fmt: skip

    def targets(self, model: nn.Module) -> Targets:
        return self._targets(saved_with_head(model, self.modules_to_save))

    def check(self, model: nn.Module) -> None:
        check_targets(model, self.targets(model), {})

    def before_packing(
        self, model: nn.Module, start: str | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> Before | None:
        if self.factors == "file" or start:
            return None
        wanted = find_targets(model, self.targets(model))

        def before(path: str, weight_OD: Tensor, rounded: Rounded) -> Begun | None:
            if path not in wanted or self.r > min(weight_OD.shape):  # `attach` says what is wrong with that
                return None
            return Begun(weight_OD, *_factors(weight_OD, self.r))

        return before

    def attach(self, model: nn.Module) -> None:
        adapt(model, self.targets(model), self._site)

    def _site(self, path: str, linear: nn.Module) -> Site:
        """Reads the weight; RecipeError for a rank above the matrix and for a weight that is no matrix of numbers."""
        inputs, outputs = features(linear)
        if self.r > min(inputs, outputs):
            raise RecipeError(
                f"{path} is {outputs} x {inputs} and has no {self.r} singular vectors", where="method.r", value=self.r,
                remedy=f"at most {min(inputs, outputs)}, or leave the module out by exclude_modules",
            )  # fmt: skip
        weight: Any = linear.weight
        begun = linear.begun if is_packed(linear) else None
        if self.factors == "svd" and not is_dense(linear) and begun is None:
            raise RecipeError(
                f"{path} is stored as {type(linear).__name__}, and the start needs the singular vectors of the weight "
                "before it was rounded", where="model.quantization", value=path,
                remedy="give the dense model as model.path (model.quantization: nf4 packs it after the start), or use "
                "method: lora",
            )  # fmt: skip
        if self.factors == "file":
            a_RD, b_OR = (torch.zeros(shape, device=weight.device) for shape in ((self.r, inputs), (outputs, self.r)))
        elif begun is not None:
            a_RD, b_OR = begun
        else:
            a_RD, b_OR = _factors(weight.T if isinstance(linear, Conv1D) else weight, self.r)
        core = Core(a_RD, b_OR, self.lora_alpha / self.r, self.lora_dropout)
        if self.init_std and not weight.is_meta:
            core.lora_xs_R.data.copy_(self.init_std * torch.randn(self.r, self.r))  # drawn on the CPU, for every device
        return AdaptedLinear(linear, core)

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        """W += s B R A in fp32, rounded once."""
        fold_linears(model)

    def as_lora(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(PEFT's LORA config, its tensors): the same function as a plain LoRA, lora_A = A and lora_B = B R."""
        found = peft_names.collect(model)
        for path, site in named_sites(model):
            if isinstance(core := getattr(site, "delta", None), Core):
                prefix = f"{peft_names.PREFIX}{path}."
                pair = {"lora_A.weight": found[f"{prefix}lora_xs_A"], "lora_B.weight": core.right().cpu()}
                for name in core.peft_tensors():
                    del found[f"{prefix}{name}"]
                found |= {f"{prefix}{name}": tensor for name, tensor in pair.items()}
        lora = LoRA(
            r=self.r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout, target_modules=self.target_modules,
            exclude_modules=self.exclude_modules, layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern, modules_to_save=self.modules_to_save,
        )  # fmt: skip
        return lora.config(model), found

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return peft_names.collect(model)

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        peft_names.restore(model, tensors)

    def config(self, model: nn.Module) -> dict[str, Any]:
        targets = self.targets(model)
        return {
            "peft_type": "LORA_XS", **where(model, targets), **layers(targets), "r": self.r,
            "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout, "init_std": self.init_std,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LoRAXS:
        """The factors come with the tensors of the file: no weight is decomposed again."""
        return cls(**{**known_fields(cls, config), "factors": "file"})
