"""Published memory tables, computed again term by term from the assumptions that give their numbers.

    bf16-states-7b        weights, gradients and AdamW's averages all in bf16: 8 bytes for each trained parameter
    mixed-states-7b       the usual 16: bf16 weight and gradient, fp32 master and averages
    mixed-states-by-size  the same with the layers' inputs, 2 b s h L, for 1.3 to 70 billion parameters

Their round parameter counts (7e9 for 6.74e9) are kept, and what they leave out is listed: these tables are for
comparing with books, not for planning. `published` is what was printed, and where a column follows no formula the
preset says so instead of bending one. methods.md E5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from luthier.contracts.errors import UsageError

GB = 1e9
_RANK = 16


@dataclass(frozen=True, slots=True)
class Column:
    """One way to train one model: bytes by term, and the total that was printed (GB)."""

    name: str
    terms: dict[str, float]
    published: float

    @property
    def total(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True, slots=True)
class Preset:
    """A table: `follows` False for columns whose printed numbers no formula gives."""

    name: str
    columns: tuple[Column, ...]
    assumptions: tuple[str, ...]
    unexplained: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decoder:
    """Widths of a decoder with a gated MLP."""

    parameters: float
    width: int
    layers: int
    keys: int
    ffn: int

    def adapters(self, rank: int, *, mlp: bool) -> int:
        """LoRA's parameters: r (in + out) for each matrix, whatever its shape."""
        d, k, f = self.width, self.keys, self.ffn
        return rank * self.layers * (2 * 2 * d + 2 * (d + k) + (3 * (d + f) if mlp else 0))

    def inputs(self, batch: int, tokens: int) -> float:
        """2 b s h L: the input of every layer in bf16."""
        return 2.0 * batch * tokens * self.width * self.layers


SEVEN = Decoder(7e9, 4096, 32, 4096, 11008)
SIZES = {
    "1.3B": Decoder(1.3e9, 2048, 24, 2048, 0),
    "7B": SEVEN,
    "13B": Decoder(13e9, 5120, 40, 5120, 13824),
    "34B": Decoder(34e9, 7168, 60, 7168, 20480),
    "70B": Decoder(70e9, 8192, 80, 1024, 28672),
}  # fmt: skip
_PRINTED = {
    "1.3B": (21, 3.5, 2),
    "7B": (112, 16, 7),
    "13B": (208, 28, 12),
    "34B": (544, 70, 25),
    "70B": (1120, 145, 48),
}


def _states(base: float, trained: float, working: float, states: float) -> dict[str, float]:
    """`base`: bytes of the frozen weights; trained ones with `working` bytes for weight and gradient, and states."""
    adapter = {"adapter": working * trained} if base else {}
    weights = base if base else working * trained
    return {"weights": weights, **adapter, "gradients": working * trained, "optimizer": states * trained}


def bf16_states_7b() -> Preset:
    p, adapters = SEVEN.parameters, SEVEN.adapters(_RANK, mlp=False)
    columns = (
        Column("full", _states(0, p, 2, 4), 56.0),
        Column("lora", _states(2 * p, adapters, 2, 4), 14.1),
        Column("qlora", _states(p / 2, adapters, 2, 4), 3.6),
    )  # fmt: skip
    return Preset("bf16-states-7b", columns, (
        "7e9 parameters, not the 6.74e9 of the model", "AdamW's averages in bf16: 8 bytes for a trained parameter",
        "LoRA of rank 16 on q, k, v and o only: 16.8 million", "NF4 as 4 bits exactly, embedding and head packed too",
        "no activations, no logits",
    ))  # fmt: skip


def mixed_states_7b() -> Preset:
    p, adapters = SEVEN.parameters, SEVEN.adapters(_RANK, mlp=False)
    columns = (
        Column("full", _states(0, p, 2, 12), 112.0),
        Column("lora", _states(2 * p, adapters, 2, 12), 14.3),
        Column("qlora", _states(p / 2, adapters, 2, 12), 3.8),
    )  # fmt: skip
    return Preset("mixed-states-7b", columns, (
        "16 bytes for a trained parameter: bf16 weight and gradient, fp32 master and averages",
        "printed as rank 16 on all layers, which means attention in every layer: all linears are 40.0 million, 0.64 GB",
        "no activations, no logits, no constants of the quantisation",
    ))  # fmt: skip


def mixed_states_by_size() -> Preset:
    columns: list[Column] = []
    for name, model in SIZES.items():
        printed = _PRINTED[name]
        adapters, inputs = model.adapters(_RANK, mlp=model.ffn > 0), {"layer inputs": model.inputs(4, 4096)}
        columns += [
            Column(f"{name} full", _states(0, model.parameters, 2, 12), printed[0]),
            Column(f"{name} lora", _states(2 * model.parameters, adapters, 2, 12) | inputs, printed[1]),
            Column(f"{name} qlora", _states(model.parameters / 2, adapters, 2, 12) | inputs, printed[2]),
        ]
    return Preset("mixed-states-by-size", tuple(columns), (
        "full: 16 bytes for a parameter and no activations", "lora, qlora: 4 rows of 4,096 tokens, inputs of layers",
        "rank 16 on all linears; 1.3B on attention alone, which is what its number needs",
        "34B: width 7,168, 60 layers, MLP 20,480",
    ), ("lora", "qlora"))  # fmt: skip


PRESETS: dict[str, Callable[[], Preset]] = {
    "bf16-states-7b": bf16_states_7b, "mixed-states-7b": mixed_states_7b,
    "mixed-states-by-size": mixed_states_by_size,
}  # fmt: skip


def preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UsageError("no such preset", where="--preset", value=name, remedy=f"one of {', '.join(PRESETS)}")
    return PRESETS[name]()
