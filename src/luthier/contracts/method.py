"""The contract of a tuning method: a frozen dataclass that IS the recipe's section and does the work.

Only `attach` is required; every other hook has a quiet default. State that a method gathers lives in named
parameters and buffers of its sites (models/sites.py), so that checkpoints carry it and the dataclass stays
frozen. Inverses live side by side: attach/merge, tensors/load.

A field's annotation, default and `field(metadata={"doc": "why change it", "unit": "tokens"})` are its entry in the
recipe's schema (`luthier schema --write`): that is how recipes are checked and explained without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.contracts.errors import NotMergeable

SCHEDULED = "luthier_scheduled"


def trains(parameter: Tensor) -> bool:
    """Now, or at some step of a schedule: then a method sets the attribute `SCHEDULED` on it when it attaches, and the
    optimizer and checkpoints count it whether or not it rests at the moment."""
    return parameter.requires_grad or getattr(parameter, SCHEDULED, False)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the planner adds up, in numbers of elements."""

    trainable: int
    frozen: int
    optimizer_states: int


class Method:
    """Base of every tuning method. Fields carry the field-standard names (`r`, `lora_alpha`, ...)."""

    paper: ClassVar[str] = ""
    mergeable: ClassVar[bool] = False
    peft_type: ClassVar[str | None] = None  # the `peft_type` of its files, None = own layout or a whole model
    trains_base: ClassVar[bool] = False  # base weights change: the result is a model, `off` needs a frozen copy
    default_learning_rate: ClassVar[float] = 2e-4
    starts_elsewhere: ClassVar[str] = ""  # why the model does not start as the base, where it does not
    config_keys: ClassVar[Mapping[str, Any]] = {}  # keys of its files beyond artifact/adapter_config.py: (check, words)
    projects: ClassVar[bool] = False  # its groups carry a `projection`, which not every optimizer steps
    looks_at_rows: ClassVar[bool] = False  # `look` wants passes over the first rows before the first step
    virtual_tokens: int = 0  # prompt methods: tokens that the packer reserves per root
    first_position: int = 0  # of a row's first real token: the positions before it belong to virtual tokens

    def attach(self, model: nn.Module) -> None:
        """Add sites and set `requires_grad`: exactly what trains, nothing else. Raises RecipeError."""
        raise NotImplementedError

    def with_texts(self, tokenize: Callable[[str], list[int]]) -> Method:
        """Itself, with what its fields say in words read into token ids; asked before `attach` in a training."""
        return self

    def check(self, model: nn.Module) -> None:
        """Before a training: RecipeError for a field that names nothing in this model. Not asked of loaded files."""

    def look(self, model: nn.Module, passes: Iterable[Callable[[], None]]) -> None:
        """After `attach`, before the first step, of a fresh or resumed run: each of `passes` runs one microbatch of the
        training rows forward without gradients, so that hooks see activations (EVA). Pure of everything else."""

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups: {"params": [...], "names": [...]} and what a group has of its own.

        Default: one group of all parameters that ever train; tensors of one dimension get no weight decay.
        `lr_scale`: times the run's rate; `lr`: a peak rate under the same schedule; `weight_decay`.
        `projection`: settings of a low-rank projection of the gradients (engine/projected.py).
        """
        named = [(name, p) for name, p in model.named_parameters() if trains(p)]
        decayed = [(name, p) for name, p in named if p.ndim > 1]
        plain = [(name, p) for name, p in named if p.ndim <= 1]
        made = [{"params": [p for _, p in decayed], "names": [name for name, _ in decayed]}]
        made.append({"params": [p for _, p in plain], "names": [n for n, _ in plain], "weight_decay": 0.0})
        return [group for group in made if group["params"]]

    def penalty(self, model: nn.Module) -> Tensor | float:
        """A term added once per optimizer step (orthogonality, EWC, L2-SP); not divided by any weight."""
        return 0.0

    def before_step(self, model: nn.Module, step: int, steps: int) -> None:
        """Before the forward passes of step `step` (from 1): what trains in it, where that changes. A pure function of
        the model's shape and the numbers, so that a resumed run finds the same; see `SCHEDULED`."""

    def begin_step(self, model: nn.Module, microbatches: Sequence[Batch]) -> None:
        """What a step is made of, after `before_step` and before the first forward; again where it starts anew with
        smaller microbatches. For terms inside the model whose divisor is the whole step's (a router's balance)."""

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        """After the optimizer's step, gradients still there."""

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        """Within it the model is exactly the base again (or NotImplementedError where `trains_base`)."""
        raise NotImplementedError
        yield

    def merge(self, model: nn.Module) -> None:
        """Fold into the base and remove the sites, or refuse with the reason."""
        raise NotMergeable(f"{type(self).__name__} cannot be folded into the base weights")

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The method's tensors under the names of its file (PEFT's names where PEFT has the type)."""
        raise NotImplementedError

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors` on a model this method is attached to. All names must match, or ModelError."""
        raise NotImplementedError

    def config(self, model: nn.Module) -> dict[str, Any]:
        """The method's part of `adapter_config.json`."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Method:
        """Inverse of `config`: from an allow-list of keys; unknown keys are reported, never executed."""
        raise NotImplementedError

    def footprint(self, model: nn.Module) -> Footprint:
        """Elements that train, that stay frozen, and that the optimizer keeps (two per trained element)."""
        trainable = sum(p.numel() for p in model.parameters() if trains(p))
        total = sum(p.numel() for p in model.parameters())
        return Footprint(trainable, total - trainable, 2 * trainable)
