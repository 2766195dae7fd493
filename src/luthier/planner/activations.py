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
from luthier.planner.trained import Extra, Keeps, Trained

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
    part: int = 0  # of an ordinary layer's and of the last one's what is back while its MLP is computed again
    part_last: int = 0


def kept(form: Form, trained: Trained, load: Load, numbers: Numbers, part: str = "") -> Kept:
    """Of this microbatch; with every row in the last layer where few are left out. `part`: computed again in each."""
    of_layers = [_layer(form, keeps, trained, numbers) for keeps in trained.layers[trained.first :]] or [0]
    ordinary, whole, inner = sum(of_layers) // len(of_layers), of_layers[-1], _inner(form, numbers)
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
    scores, extra = _scores(form, load), trained.extra or Extra()
    more, more_last, more_flight = (
        line.at(load.tokens, numbers.compute) for line in (extra.layer, extra.last, extra.flight)
    )
    spared = [_spared(form, keeps, trained, part, numbers) for keeps in trained.layers[trained.first :]] or [0]
    spared_layer = load.tokens * (sum(spared) // len(spared))
    rows = spared[-1] - (2 * form.keys * numbers.compute if load.restricted and part == "attention" else 0)
    spared_last = load.kept * max(0, rows)
    return Kept(
        layer=max(0, load.tokens * ordinary + of_room + scores + more - spared_layer),
        last=max(0, last + scores + more_last - spared_last),
        first_input=0 if trained.embedding_trains else residual, shared=shared, stream=residual,
        flight=max(0, load.tokens * flight + more_flight), flight_last=max(0, load.kept * flight + more_flight),
    )  # fmt: skip


def _layer(form: Form, keeps: Keeps, trained: Trained, numbers: Numbers) -> int:
    """Bytes for each token of a layer, beyond gate and up."""
    saves, compute = keeps.saves, numbers.compute
    elements = form.queries + 2 * form.keys + form.queries + keeps.ranks + keeps.outputs
    if not _spares(keeps, trained, numbers):
        elements += form.width * (("attention_in" in saves) + ("mlp_in" in saves))
    if "attention_out" in saves and not numbers.kernels and not numbers.plain:
        elements += form.queries
    if form.head_norms or form.attention_dropout:
        elements += form.queries + form.keys
    elements += 0 if form.gated else form.mlp_kept * form.ffn
    elements += form.ffn * ("mlp_out" in saves and not as_one(form, keeps, trained, numbers))
    normed = 2 * form.width * numbers.stream if _keeps_normed(trained, numbers) else 0
    masks = 2 * form.width if form.dropout else 0
    return elements * compute + 2 * form.width * numbers.stream + normed + masks + FLOAT * (2 * NORM + form.heads)


def _spared(form: Form, keeps: Keeps, trained: Trained, part: str, numbers: Numbers) -> int:
    """Bytes for each token that a part of a layer does not keep, less its input where nobody else keeps that.

    Of ranks and unscaled outputs, four sevenths are the attention's.
    """
    saves, ranks, beside = keeps.saves, keeps.ranks, form.queries + 2 * form.keys + form.width
    if _spares(keeps, trained, numbers):
        saves = saves - {"attention_in", "mlp_in"}  # nobody keeps them
    if part == "attention":
        elements = 2 * (form.queries + form.keys)
        elements += form.queries if "attention_out" in saves and not numbers.plain else 0
        elements += (form.queries + form.keys if form.head_norms else 0) + 4 * ranks // 7
        elements += min(keeps.outputs, beside) - (0 if "attention_in" in saves else form.width)
        return elements * numbers.compute + FLOAT * form.heads
    if part == "mlp":
        elements = (2 if form.gated else form.mlp_kept) * form.ffn + 3 * ranks // 7
        elements += form.ffn * ("mlp_out" in saves and not as_one(form, keeps, trained, numbers))
        elements += max(0, keeps.outputs - beside) - (0 if "mlp_in" in saves else form.width)
        return elements * numbers.compute
    return 0


def _taken(form: Form, trained: Trained, numbers: Numbers) -> int:
    """Bytes for each token of the last layer's pass over all rows, which ends at its keys and values."""
    keeps = trained.layers[-1] if trained.layers else Keeps()
    reads = "attention_in" in keeps.saves and not _spares(keeps, trained, numbers)
    elements = 2 * form.keys + form.width * reads + min(keeps.ranks, _of_keys(keeps))
    normed = form.width * numbers.stream if _keeps_normed(trained, numbers) else 0
    outputs = 2 * form.keys + form.queries if keeps.outputs else 0
    return (elements + outputs) * numbers.compute + form.width * numbers.stream + normed + FLOAT * NORM


def _scores(form: Form, load: Load) -> int:
    """Softmax, what dropout leaves of it, and the noise: in training, where attention drops."""
    return round(2 * load.pairs * form.heads * 3 * FLOAT) if form.attention_dropout else 0


def _of_keys(keeps: Keeps) -> int:
    """Ranks of queries, keys and values: three sevenths of a layer whose linears all carry one."""
    return -(-3 * keeps.ranks // 7)


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


def _spares(keeps: Keeps, trained: Trained, numbers: Numbers) -> bool:
    """Inputs that come from a frozen norm are made again, where low-rank pairs read them."""
    return numbers.plain and bool(keeps.ranks) and not trained.base_trained and not trained.norms_train


def as_one(form: Form, keeps: Keeps, trained: Trained, numbers: Numbers) -> bool:
    """The feed-forward block is one function: pairs on all three of its linears, and nothing besides."""
    reads = {"mlp_in", "mlp_out"} <= keeps.saves
    return form.gated and reads and not keeps.outputs and _spares(keeps, trained, numbers)


def _keeps_normed(trained: Trained, numbers: Numbers) -> bool:
    """Rows before a trained norm's weight: where the norm is torch's."""
    return trained.norms_train and not numbers.kernels and not numbers.plain


def _flight(form: Form, trained: Trained, numbers: Numbers, *, again: bool) -> int:
    product = "mlp_out" in trained.saves
    at_swiglu = (3 if product else 4) * form.ffn if form.gated else 2 * form.ffn
    if trained.layers and as_one(form, trained.layers[-1], trained, numbers):
        at_swiglu = (3 if again else 2) * form.ffn
    return at_swiglu * numbers.compute + form.width * numbers.stream


@dataclass(frozen=True, slots=True)
class Again:
    """Which of the layers are computed a second time: 0, every, 2 every, ...; `every` 0: none."""

    layers: int
    every: int = 0

    def at(self, layer: int) -> bool:
        return self.every > 0 and layer % self.every == 0

    @property
    def count(self) -> int:
        """Of those below the last."""
        return -(-(self.layers - 1) // self.every) if self.every else 0


def held_by_forward(found: Kept, again: Again) -> int:
    """At the end of the forward pass."""
    last = found.stream if again.at(again.layers - 1) else found.last
    first = 0 if again.every or again.layers == 1 else found.first_input
    return found.shared + again.count * found.stream + (again.layers - 1 - again.count) * found.layer + last - first


def held_in_backward(found: Kept, again: Again) -> int:
    """In the backward of the layer before the last, what is kept and in flight together."""
    if again.layers == 1:
        return held_in_last(found, again)
    last = found.stream if again.at(again.layers - 1) else found.last
    once_more = found.layer - found.stream if again.at(again.layers - 2) else 0
    return held_by_forward(found, again) - last + once_more + found.part + found.flight


def held_in_last(found: Kept, again: Again) -> int:
    """In the backward of the last layer."""
    once_more = found.last if again.at(again.layers - 1) else 0
    return held_by_forward(found, again) + once_more + found.part_last + found.flight_last


def evaluation(form: Form, tokens: int, numbers: Numbers) -> int:
    """A forward pass without gradients: the stream, its middle, a norm's output, and the MLP's three."""
    wide = (3 if form.gated else 2) * form.ffn
    attention = 2 * form.queries + 2 * form.keys
    return tokens * (3 * form.width * numbers.stream + max(wide, attention) * numbers.compute)
