"""Bytes of a training, term by term, at each of its moments; the largest moment is the peak.

    head        end of the forward pass: everything kept, and the log-probabilities
    last        backward of the last layer            backward   of the layer before it, its activations gone
    update      gradients whole, activations gone     evaluation held-out rows, no gradients

The instrument that a prediction speaks of: bytes that torch's operations hold (on a CPU bench/allocated.py, on a GPU
the allocator's peak), weights included. What the process needs besides is `beyond`: a GPU's context and the
allocator's slack (methods.md E4); on a CPU the interpreter and its libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from luthier.models.adapted_mlp import room_for
from luthier.planner import activations, head
from luthier.planner.activations import FLOAT, Again, Numbers
from luthier.planner.formats import Stored, state_bytes, workspace_bytes
from luthier.planner.load import Course, Load
from luthier.planner.shape import ModelShape
from luthier.planner.trained import Trained

MOMENTS = ("head", "last", "backward", "update", "evaluation")
TERMS = (
    "weights", "adapter", "optimizer", "gradients", "activations", "in flight", "logits", "casts", "workspace",
    "evaluation",
)  # fmt: skip
CONTEXT = 500 << 20  # of CUDA on a recent GPU
SLACK = 0.05  # of the allocator's peak that fragmentation costs
LIBRARIES = 450 << 20  # resident interpreter, torch and transformers on a CPU


@dataclass(frozen=True, slots=True)
class Setting:
    """What a recipe decides, in the words of a plan."""

    device: str = "cpu"  # cpu or cuda
    stored: Stored = Stored("none")
    compute: int = 4  # bytes of a number in matrix products
    trained: int = 4  # bytes of a number that trains; its gradient has 4 in any case
    optimizer: str = "adamw"
    recompute_every: int = 0  # 0 keeps all activations, 1 recomputes every layer, n layers 0, n, 2 n, ...
    recompute_part: str = ""  # attention or mlp: of every layer
    keeps_all: bool = False  # told to keep what could be made again
    in_backward: bool = False
    head: str = "jacobian"

    def recomputed(self, layers: int) -> int:
        return -(-layers // self.recompute_every) if self.recompute_every else 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Terms of every moment; the peak is the sum of the largest."""

    moments: dict[str, dict[str, int]]
    load: Load
    beyond: int

    @property
    def moment(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def terms(self) -> dict[str, int]:
        """At the peak."""
        return self.moments[self.moment]

    @property
    def peak(self) -> int:
        return sum(self.terms.values())

    @property
    def needs(self) -> int:
        """What a device must have free."""
        return self.peak + self.beyond

    @property
    def limiting(self) -> str:
        """The largest term at the peak."""
        return max(self.terms, key=lambda name: self.terms[name])


def memory_of(shape: ModelShape, trained: Trained, setting: Setting, course: Course) -> Memory:
    """Of the microbatch that needs most."""
    found = [_memory(shape, trained, setting, course, load) for load in course.loads]
    return max(found, key=lambda memory: memory.peak)


def _memory(shape: ModelShape, trained: Trained, setting: Setting, course: Course, load: Load) -> Memory:
    form, numbers = replace(shape.form, layers=shape.form.layers - trained.first), numbers_of(trained, setting)
    load = replace(load, whole=trained.every_row)
    again, numbers = Again(max(1, form.layers), setting.recompute_every), _roomy(shape, trained, setting, numbers)
    kept = activations.kept(form, trained, load, numbers, setting.recompute_part)
    always, gradients = _always(shape, trained, setting), trained.active * FLOAT
    before, during, whole = _gradients(trained, setting, course, gradients)
    room = _in_room(trained, setting, gradients)
    standing = head.standing(form, setting.head, in_room=bool(room))
    lent = _second(trained) * FLOAT if room and course.microbatches == 1 else 0
    stepping = workspace_bytes(setting.optimizer, trained.largest, setting.device)
    forward = activations.held_by_forward(kept, again)
    moments = {
        "head": always | {"gradients": before + standing, "activations": forward,
                          "logits": head.head_bytes(form, load, setting.head, numbers, setting.device, lent)},
        "last": always | {"gradients": before + standing,
                          "activations": activations.held_in_last(kept, again) - kept.flight_last,
                          "in flight": kept.flight_last},
        "backward": always | {"gradients": during + standing,
                              "activations": activations.held_in_backward(kept, again) - kept.flight,
                              "in flight": kept.flight},
        "update": _kept_only(always) | {"gradients": whole, "workspace": stepping},
    }  # fmt: skip
    if course.evaluation_tokens:
        rows = course.evaluation_tokens
        found = activations.evaluation(form, rows, numbers) + head.evaluation(form, rows, setting.device, numbers)
        left = before if course.microbatches == 1 else room
        moments["evaluation"] = always | {"gradients": left, "evaluation": found}
    peak = max(sum(moment.values()) for moment in moments.values())
    beyond = LIBRARIES if setting.device == "cpu" else CONTEXT + round(SLACK * peak)
    return Memory({name: {k: v for k, v in terms.items() if v} for name, terms in moments.items()}, load, beyond)


def _roomy(shape: ModelShape, trained: Trained, setting: Setting, numbers: Numbers) -> Numbers:
    """With the room of feed-forward blocks for what they would make again, where the recipe leaves it to them."""
    again = setting.recompute_every == 1 or setting.recompute_part == "mlp" or setting.keeps_all
    blocks = [activations.as_one(shape.form, keeps, trained, numbers) for keeps in trained.layers]
    return replace(numbers, room=room_for(shape.parameters)) if any(blocks) and not again else numbers


def numbers_of(trained: Trained, setting: Setting) -> Numbers:
    """The residual stream has the dtype of the embedding: that of what trains where the base does."""
    stream = setting.trained if trained.base_trained else FLOAT if setting.device == "cpu" else setting.stored.dense
    return Numbers(stream, setting.compute, kernels=setting.device != "cpu" and setting.compute < FLOAT)


def _always(shape: ModelShape, trained: Trained, setting: Setting) -> dict[str, int]:
    """What lies there in every moment of a pass."""
    weights = base_bytes(shape, trained, setting)
    casts = trained.base_trained * setting.compute if setting.compute < setting.trained else 0
    workspace = 0 if trained.base_trained else setting.stored.workspace(shape.largest_linear, setting.compute)
    return {
        "weights": weights,
        "adapter": (trained.elements - trained.base_trained) * setting.trained + trained.buffers,
        "optimizer": state_bytes(setting.optimizer, trained.tensors), "casts": casts, "workspace": workspace,
    }  # fmt: skip


def base_bytes(shape: ModelShape, trained: Trained, setting: Setting) -> int:
    """The base's weights: packed linears and dense rest where it is frozen, else as what trains is stored."""
    if trained.base_trained:
        frozen = shape.parameters - trained.base_trained
        return trained.base_trained * setting.trained + frozen * setting.stored.dense
    stored, form = setting.stored, shape.form
    tables = form.vocabulary * form.width * (1 if form.tied or setting.head == "scores" else 2)
    narrower = max(0, stored.dense - stored.tables) if stored.name != "none" else 0  # models/weights/narrow.py
    return stored.linears(shape.linears, shape.linear_rows) + shape.rest * stored.dense - tables * narrower


def _kept_only(always: dict[str, int]) -> dict[str, int]:
    """Between passes: neither casts nor workspace."""
    return always | {"casts": 0, "workspace": 0}


def _in_room(trained: Trained, setting: Setting, gradients: int) -> int:
    """Gradients of whole matrices stay from step to step on a CPU (models/gradient_room.py)."""
    return gradients if trained.base_trained and setting.device == "cpu" and not setting.in_backward else 0


def _second(trained: Trained) -> int:
    """Elements of the largest tensor but one: where the largest is the head's, the embedding's."""
    return sum(sorted(tensor.elements for tensor in trained.tensors)[-2:-1])


def _gradients(trained: Trained, setting: Setting, course: Course, whole: int) -> tuple[int, int, int]:
    """(at the end of the forward pass, in the backward of the layer before the last, before the update)."""
    if setting.in_backward and course.microbatches == 1:
        two = 2 * trained.largest * FLOAT
        return 0, two, two
    if course.microbatches > 1:
        return whole, whole, whole
    room = _in_room(trained, setting, whole)
    return room, room, whole


def with_tokens(course: Course, tokens: int) -> Course:
    """The same steps in microbatches of at most so many tokens, rows taken as divisible."""
    smaller: Sequence[Load] = [_share(load, min(1.0, tokens / load.tokens)) for load in course.loads]
    largest = max(load.tokens for load in smaller)
    return replace(course, loads=tuple(smaller), microbatches=max(1, round(course.tokens_per_step / largest)))


def _share(load: Load, share: float) -> Load:
    return Load(round(load.tokens * share), round(load.scored * share), load.pairs * share, round(load.masks * share))
