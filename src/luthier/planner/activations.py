"""What the forward pass keeps for the backward, layer by layer, by this engine's own operations.

For each token of a layer, in elements (D width, A queries, K keys, F MLP; each only where somebody keeps it):

    2 D        the layer's input and its middle, kept by the two norms
    D + D      what the norms put out, where the linears behind them are adapted or trained (a frozen linear keeps no
               input); with trained norms D + D more, before their weight. Float32 on a CPU keeps neither beside
               low-rank pairs, and nothing more for trained norms
    A + 2 K    queries and keys after rotation, values; A + K more where a family norms queries and keys
    A (+ A)    attention's output; on a CPU beyond float32 once more, laid out as tokens by width, where the output
               linear keeps it (and for answers that share a prompt: not counted)
    2 F + F    gate and up (fused SwiGLU keeps nothing else), and their product where the down linear keeps it. Float32
               on a CPU, low-rank pairs on all three: no product, and gate and up of so many layers as `room` holds
    R, O       x A^T of low-rank pairs; with DoRA every output before it is scaled
    plain      an MLP without a gate keeps F, of GPT-2's gelu written out 4 F; dropout a byte for each number that it
               drops; attention with dropout its shares before and after it and the noise, 12 bytes
               for each query, key and head, and scaled queries and keys
    small      one number for each norm, one for each head

The last layer keeps all rows of what its keys and values need and only the scored rows of everything else; its masks
are one float and one byte for each scored row and key. `flight` is what the backward of one layer holds besides: the
gradient of the residual stream, and of the MLP four F at the SwiGLU while its product is gone already; as one function
with the pairs two F, three where gate and up are made again.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.planner.load import Load
from luthier.planner.shape import Form
from luthier.planner.trained import Trained

NORM, FLOAT = 1, 4


@dataclass(frozen=True, slots=True)
class Numbers:
    """Bytes of a number in the residual stream and in matrix products, and whether fused GPU kernels run."""

    stream: int
    compute: int
    kernels: bool = False
    room: int | None = None  # bytes for gate and up of all layers (models/adapted_mlp.py); None: without end

    @property
    def plain(self) -> bool:
        """Float32 on a CPU, whose functions keep less than those of torch."""
        return self.stream == self.compute == FLOAT and not self.kernels


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of one microbatch's activations without recomputation."""

    layer: int  # an ordinary layer, its input included
    last: int
    first_input: int  # the first layer's input, which nobody keeps below the first adapter
    shared: int  # cos and sin, for all layers
    stream: int  # all rows of the residual stream: a layer's input
    flight: int
    flight_last: int


def kept(form: Form, trained: Trained, load: Load, numbers: Numbers) -> Kept:
    """Of this microbatch; with every row in the last layer where few are left out."""
    whole, inner = _layer(form, trained, numbers), _inner(form, numbers)
    of_room = _of_room(form, load, inner, numbers)
    turned = 2 * form.head_width * numbers.stream
    residual = load.tokens * form.width * numbers.stream
    if load.restricted:
        taken = load.tokens * _taken(form, trained, numbers)
        last = taken + load.kept * (whole + inner - 2 * form.keys * numbers.compute) + load.masks * (FLOAT + 1)
        shared = (load.tokens + load.kept) * turned
    else:
        last, shared = load.tokens * (whole + inner), load.tokens * turned
    flight = _flight(form, trained, numbers, again=of_room < load.tokens * inner)
    scores = _scores(form, load)
    return Kept(
        layer=load.tokens * whole + of_room + scores, last=last + scores,
        first_input=0 if trained.embedding_trains else residual, shared=shared, stream=residual,
        flight=load.tokens * flight, flight_last=load.kept * flight,
    )  # fmt: skip


def _layer(form: Form, trained: Trained, numbers: Numbers) -> int:
    """Bytes for each token of a layer, beyond gate and up."""
    saves, compute = trained.saves, numbers.compute
    elements = form.queries + 2 * form.keys + form.queries + trained.ranks + trained.outputs
    if not _spares(trained, numbers):
        elements += form.width * (("attention_in" in saves) + ("mlp_in" in saves))
    if "attention_out" in saves and not numbers.kernels and not numbers.plain:
        elements += form.queries
    if form.head_norms or form.attention_dropout:
        elements += form.queries + form.keys
    elements += 0 if form.gated else form.mlp_kept * form.ffn
    elements += form.ffn * ("mlp_out" in saves and not as_one(form, trained, numbers))
    normed = 2 * form.width * numbers.stream if _keeps_normed(trained, numbers) else 0
    masks = 2 * form.width if form.dropout else 0
    return elements * compute + 2 * form.width * numbers.stream + normed + masks + FLOAT * (2 * NORM + form.heads)


def _taken(form: Form, trained: Trained, numbers: Numbers) -> int:
    """Bytes for each token of the last layer's pass over all rows, which ends at its keys and values."""
    reads = "attention_in" in trained.saves and not _spares(trained, numbers)
    elements = 2 * form.keys + form.width * reads + min(trained.ranks, _of_keys(trained))
    normed = form.width * numbers.stream if _keeps_normed(trained, numbers) else 0
    outputs = 2 * form.keys + form.queries if trained.outputs else 0
    return (elements + outputs) * numbers.compute + form.width * numbers.stream + normed + FLOAT * NORM


def _scores(form: Form, load: Load) -> int:
    """Softmax, what dropout leaves of it, and the noise: in training, where attention drops."""
    return round(2 * load.pairs * form.heads * 3 * FLOAT) if form.attention_dropout else 0


def _of_keys(trained: Trained) -> int:
    """Ranks of queries, keys and values: three sevenths of a layer whose linears all carry one."""
    return -(-3 * trained.ranks // 7)


def _inner(form: Form, numbers: Numbers) -> int:
    """Bytes for each token of gate and up."""
    return 2 * form.ffn * numbers.compute if form.gated else 0


def _of_room(form: Form, load: Load, inner: int, numbers: Numbers) -> int:
    """Bytes of gate and up in an ordinary layer, the average of those that keep them and those that do not."""
    whole = load.tokens * inner
    if numbers.room is None or not whole:
        return whole
    ordinary = max(1, form.layers - 1)
    return whole * max(0, min(ordinary, numbers.room // whole - 1)) // ordinary


def _spares(trained: Trained, numbers: Numbers) -> bool:
    """Inputs that come from a frozen norm are made again, where low-rank pairs read them."""
    return numbers.plain and bool(trained.ranks) and not trained.base_trained and not trained.norms_train


def as_one(form: Form, trained: Trained, numbers: Numbers) -> bool:
    """The feed-forward block is one function: pairs on all three of its linears, and nothing besides."""
    reads = {"mlp_in", "mlp_out"} <= trained.saves
    return form.gated and reads and not trained.outputs and _spares(trained, numbers)


def _keeps_normed(trained: Trained, numbers: Numbers) -> bool:
    """Rows before a trained norm's weight: where the norm is torch's."""
    return trained.norms_train and not numbers.kernels and not numbers.plain


def _flight(form: Form, trained: Trained, numbers: Numbers, *, again: bool) -> int:
    product = "mlp_out" in trained.saves
    at_swiglu = (3 if product else 4) * form.ffn if form.gated else 2 * form.ffn
    if as_one(form, trained, numbers):
        at_swiglu = (3 if again else 2) * form.ffn
    return at_swiglu * numbers.compute + form.width * numbers.stream


def held_by_forward(found: Kept, form: Form, recomputed: int) -> int:
    """At the end of the forward pass. `recomputed`: layers, from the first on, that keep only their input."""
    layers = max(1, form.layers)
    if not recomputed:
        return found.shared + (layers - 1) * found.layer + found.last - (found.first_input if layers > 1 else 0)
    whole = max(0, layers - recomputed)
    last = found.last if whole else 0
    ordinary = max(0, whole - 1)
    return found.shared + recomputed * found.stream + ordinary * found.layer + last


def held_in_backward(found: Kept, form: Form, recomputed: int) -> int:
    """In the backward of the layer before the last, what is kept and in flight together."""
    layers = max(1, form.layers)
    if layers == 1:
        return held_by_forward(found, form, recomputed) + found.flight_last
    if not recomputed:
        return held_by_forward(found, form, 0) - found.last + found.flight
    ordinary = max(0, layers - recomputed - 1)
    inputs = min(recomputed, layers - 1) * found.stream
    again = found.layer - found.stream if not ordinary else 0
    return found.shared + inputs + ordinary * found.layer + again + found.flight


def held_in_last(found: Kept, form: Form, recomputed: int) -> int:
    """In the backward of the last layer."""
    again = found.last if recomputed >= max(1, form.layers) else 0
    return held_by_forward(found, form, recomputed) + again + found.flight_last


def evaluation(form: Form, tokens: int, numbers: Numbers) -> int:
    """A forward pass without gradients: the stream, its middle, a norm's output, and the MLP's three."""
    wide = (3 if form.gated else 2) * form.ffn
    attention = 2 * form.queries + 2 * form.keys
    return tokens * (3 * form.width * numbers.stream + max(wide, attention) * numbers.compute)
