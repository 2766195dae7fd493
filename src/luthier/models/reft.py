"""ReFT: an edit of a few hidden rows h (T, D) in a subspace of R directions, its variants as pure functions.

    loreft     h + R'(act(W h + b) - R h)    R orthonormal          direft      h + R'act(W h + b)    R orthonormal
    noreft     the same, R free                                     nodireft    the same, R free
    consreft   h + R'(b - R h)               R orthonormal          lobireft    h + R'b               R orthonormal

R, W (R, D), b (R,) in fp32 on any base, the sum rounded once to the dtype of h. The functions return the edit alone.
Orthonormal rows are kept by going back to the nearest such matrix after each step (`orthonormal`, the polar factor): R
is an ordinary parameter, so what is saved is the matrix itself, to the bit. pyreft parametrises R by Householder
reflections and a dense D x D basis per edit; along the directions that keep R orthonormal both have the same gradient.
Dropout falls on the edit; pyreft's falls on h + edit and thins the hidden state itself, which is left out.
Fast paths stand beside plain twins: `loreft` / `loreft_plain`, `edit_rows` / `edit_rows_plain`, `orthonormal` / SVD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.contracts.errors import ModelError
from luthier.models.prompt_edges import Edges, edited_rows

Act = Callable[[Tensor], Tensor]
ACTS: dict[str, Act | None] = {
    "linear": None, "relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu, "tanh": torch.tanh,
}  # fmt: skip
FREE = ("noreft", "nodireft")  # R is any matrix
CONSTANT = ("consreft", "lobireft")  # no W
PREFIX, SUFFIX, SHARED, EVERY = "prefix", "suffix", "shared", "all"


def loreft(h_TD: Tensor, r_RD: Tensor, w_RD: Tensor, b_R: Tensor, act: Act | None = None) -> Tensor:
    """R'(act(W h + b) - R h); without an activation one product with W - R. Also noreft, with any R."""
    if act is not None:
        return loreft_plain(h_TD, r_RD, w_RD, b_R, act)
    return functional.linear(h_TD, w_RD - r_RD, b_R) @ r_RD


def loreft_plain(h_TD: Tensor, r_RD: Tensor, w_RD: Tensor, b_R: Tensor, act: Act | None = None) -> Tensor:
    """The same, every term spelled out."""
    source_TR = h_TD @ w_RD.T + b_R
    source_TR = source_TR if act is None else act(source_TR)
    return (source_TR - h_TD @ r_RD.T) @ r_RD


def consreft(h_TD: Tensor, r_RD: Tensor, b_R: Tensor) -> Tensor:
    """R'(b - R h): the subspace is set to a constant."""
    return (b_R - h_TD @ r_RD.T) @ r_RD


def direft(h_TD: Tensor, r_RD: Tensor, w_RD: Tensor, b_R: Tensor, act: Act | None = None) -> Tensor:
    """R'act(W h + b): nothing is taken away first. Also nodireft, with any R."""
    source_TR = functional.linear(h_TD, w_RD, b_R)
    return (source_TR if act is None else act(source_TR)) @ r_RD


def lobireft(h_TD: Tensor, r_RD: Tensor, b_R: Tensor) -> Tensor:
    """R'b: one vector for every row."""
    return (b_R @ r_RD).expand_as(h_TD)


def orthonormal(r_SRD: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows, (R R')^(-1/2) R, in float64; any leading shape, one batched call."""
    wide = r_SRD.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    return ((vectors / values.sqrt().unsqueeze(-2)) @ vectors.mT @ wide).to(r_SRD.dtype)


def orthonormal_plain(r_SRD: Tensor) -> Tensor:
    """The same by singular values, all set to 1."""
    left, _, right = torch.linalg.svd(r_SRD.double(), full_matrices=False)
    return (left @ right).to(r_SRD.dtype)


def edit_rows(y_TD: Tensor, rows: Tensor, edited: Callable[[Tensor], Tensor]) -> Tensor:
    """y with `rows` (each at most once) exchanged for edited(y[rows]): only these are computed and kept."""
    return y_TD.index_copy(0, rows, edited(y_TD.index_select(0, rows)))


def edit_rows_plain(y_TD: Tensor, rows: Tensor, edited: Callable[[Tensor], Tensor]) -> Tensor:
    """The same, all rows computed and chosen by a mask."""
    chosen_T1 = torch.zeros(len(y_TD), 1, dtype=torch.bool, device=y_TD.device).index_fill(0, rows, True)
    return torch.where(chosen_T1, edited(y_TD), y_TD)


class Intervention(nn.Module):
    """R, W, b of one edit. `kind` is the variant's name."""

    W: nn.Parameter | None
    float32_only: ClassVar[bool] = True  # rows in bfloat16 are not orthonormal

    def __init__(self, kind: str, rank: int, width: int, place: torch.device) -> None:
        """Fresh parameters, drawn by torch's CPU generator: R orthonormal, or W and a free R as nn.Linear draws."""
        super().__init__()
        self.kind, self.act, self.dropout = kind, "linear", 0.0
        drawn = place if place.type == "meta" else torch.device("cpu")
        r_RD, w_RD, b_R = (torch.empty(shape, device=drawn) for shape in ((rank, width), (rank, width), (rank,)))
        bound = 1 / math.sqrt(width)
        if drawn.type != "meta":
            nn.init.uniform_(r_RD, -bound, bound) if self.free else nn.init.orthogonal_(r_RD)
            nn.init.uniform_(w_RD, -bound, bound)
            nn.init.uniform_(b_R, *((0.0, 1.0) if kind in CONSTANT else (-bound, bound)))
        self.R = nn.Parameter(r_RD.to(place))
        self.W = None if kind in CONSTANT else nn.Parameter(w_RD.to(place))
        self.b = nn.Parameter(b_R.to(place))

    @property
    def free(self) -> bool:
        return self.kind in FREE

    def forward(self, h_TD: Tensor) -> Tensor:
        """h + its edit, in the dtype of R (autocast or not), rounded once to that of h."""
        with torch.autocast(h_TD.device.type, enabled=False):
            wide_TD = h_TD.to(self.R.dtype)
            edit_TD = self.edit(wide_TD)
            if self.training and self.dropout:
                edit_TD = functional.dropout(edit_TD, self.dropout)
            return (wide_TD + edit_TD).to(h_TD.dtype)

    def edit(self, h_TD: Tensor) -> Tensor:
        if self.W is None:
            return (consreft if self.kind == "consreft" else lobireft)(h_TD, self.R, self.b)
        formula = direft if self.kind in ("direft", "nodireft") else loreft
        return formula(h_TD, self.R, self.W, self.b, ACTS[self.act])


class ReFT(nn.Module):
    """Beside one layer: its interventions by place, and where they go (`edges` None: every row)."""

    def __init__(self, edges: Edges | None, parts: Mapping[str, Intervention]) -> None:
        super().__init__()
        self.edges, self.parts = edges, nn.ModuleDict(dict(parts))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y_TD = y.reshape(-1, y.shape[-1])
        if self.edges is None:
            return self.parts[EVERY](y_TD).reshape(y.shape)  # type: ignore[no-any-return]
        first, last = edited_rows(self.edges, len(y_TD), y.device)
        if not len(first) and not len(last):
            return y

        def edited(h_TD: Tensor) -> Tensor:
            if SHARED in self.parts:
                return self.parts[SHARED](h_TD)  # type: ignore[no-any-return]
            pieces = zip((PREFIX, SUFFIX), h_TD.split([len(first), len(last)]), strict=True)
            return torch.cat([self.parts[name](piece_TD) for name, piece_TD in pieces if len(piece_TD)])

        return edit_rows(y_TD, torch.cat([first, last]), edited).reshape(y.shape)

    def peft_tensors(self) -> dict[str, Tensor]:
        return dict(self.parts.named_parameters())


@torch.no_grad()
def retract(model: nn.Module) -> None:
    """Every orthonormal R of the model back to orthonormal rows, those of one shape and device in one call."""
    alike: dict[Any, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, Intervention) and not module.free:
            alike.setdefault((module.R.shape, module.R.device), []).append(module.R)
    for parameters in alike.values():
        for parameter, near in zip(parameters, orthonormal(torch.stack(list(parameters))), strict=True):
            parameter.copy_(near)


def to_pyreft(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Our tensors -> pyreft's state of each intervention, by the name of its file without `intkey_` and `.bin`.

    `<...>.{layer}.{prefix|suffix|shared|all}.{R,W,b}` -> `layer_{layer}_comp_block_output_unit_pos_nunit_1#{0|1}`
    with `weight` W, `bias` b and `rotate_layer` R' (D, R). Of loreft: the other classes save no such state there.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        *_, layer, place, kind = name.split(".")
        if kind not in _THEIRS:
            raise ModelError("not a tensor of ReFT", value=name)
        key = f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{int(place == SUFFIX)}"
        found.setdefault(key, {})[_THEIRS[kind]] = (tensor.T if kind == "R" else tensor).contiguous()
    return found


def from_pyreft(states: Mapping[str, Mapping[str, Tensor]], stem: str, places: tuple[str, ...]) -> dict[str, Tensor]:
    """Inverse of `to_pyreft`. `stem`: our name of the layer list (`base_model.model.model.layers`); `places`: what
    pyreft's #0 (and #1) are, such as ("prefix", "suffix") or ("shared",)."""
    ours = {theirs: kind for kind, theirs in _THEIRS.items()}
    found: dict[str, Tensor] = {}
    for key, state in states.items():
        layer, number = key.split("_")[1], int(key.rpartition("#")[2])
        if number >= len(places) or set(state) != set(ours):
            raise ModelError("not a state of loreft", value=f"{key}: {', '.join(state)}")
        for name, tensor in state.items():
            kind = ours[name]
            found[f"{stem}.{layer}.{places[number]}.{kind}"] = (tensor.T if kind == "R" else tensor).contiguous()
    return found


_THEIRS = {"R": "rotate_layer", "W": "weight", "b": "bias"}
