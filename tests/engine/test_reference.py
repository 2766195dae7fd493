"""The reference policy: one meaning, several ways to have it; nothing of it is felt by what trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import rig
from engine.pairs import Preference, Shifted, pair_samples
from luthier.contracts.batch import Batch
from luthier.contracts.errors import NumericError, RecipeError
from luthier.contracts.event import Evaluated, StepDone
from luthier.contracts.objective import Objective
from luthier.data.collate import collate
from luthier.engine.modes import train_mode
from luthier.engine.precision import resolve_precision
from luthier.engine.reference import MethodOff, choose
from luthier.engine.task import Reference, Run
from luthier.methods.full import Full
from luthier.methods.lora import LoRA
from luthier.models.probe import open_trunk
from tiny import tiny

KINDS = ("method_off", "frozen_copy", "cached")


def build(directory: Path, kind: str, objective: Objective | None = None, **changes: Any) -> Run:
    """The rig's run over pairs, with a reference of that kind."""
    run = rig.build(directory, **{"evaluation": 0, "reference": kind, **changes})
    run.objective = objective or run.objective
    return run


def prepared(run: Run) -> Reference:
    assert run.reference is not None
    list(run.reference.ready(lambda: None))
    return run.reference


def moved(run: Run) -> None:
    """As if it had trained."""
    torch.manual_seed(3)
    for parameter in run.trunk.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))


def of_start(batch: Batch) -> Tensor:
    with torch.no_grad():
        return open_trunk(tiny("llama")).logprobs(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_start(tmp_path: Path, kind: str) -> None:
    """Whatever was trained since, and in training mode with dropout on."""
    run = build(tmp_path, kind)
    train_mode(run.trunk.model)
    reference = prepared(run)
    moved(run)
    batch = collate(run.stream.samples[3:9])
    found = reference.logprobs(batch)
    assert not found.requires_grad
    assert (found - of_start(batch)).abs().max() < 1e-6
    assert (run.trunk.logprobs(batch) - found).abs().max() > 1e-3
    assert all(module.training for module in run.trunk.model.modules())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trained_biases_and_copies_are_off_too(precision: str) -> None:
    """Under the policy's autocast as well, whose cache holds the trained ones."""
    cpu = torch.device("cpu")
    numbers = resolve_precision(precision, cpu)
    model = tiny("qwen2")
    batch = collate(pair_samples(6))
    trunk = open_trunk(model)
    with torch.no_grad(), numbers.autocast(cpu):
        start = trunk.logprobs(batch)
    method = LoRA(r=4, bias="all", modules_to_save=("lm_head",))
    method.attach(model)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    reference = MethodOff(trunk, method, numbers)
    with numbers.autocast(cpu):
        policy = trunk.logprobs(batch)
        assert torch.equal(reference.logprobs(batch), start)
        again = trunk.logprobs(batch)
        assert torch.equal(policy, again)
        assert (policy - start).abs().max() > 0.1
        again.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("objective", "method", "kinds"),
    [(Preference(), "lora", KINDS), (Shifted(), "lora", KINDS[:2]), (Preference(), "full", KINDS[1:])],
)
def test_every_kind_trains_alike(tmp_path: Path, objective: Objective, method: str, kinds: Sequence[str]) -> None:
    """Ten steps: losses, metrics and weights to 1e-6."""
    ends: dict[str, Any] = {}
    for kind in kinds:
        options = {"steps": 10, "evaluation": 6, "every": 5, "learning_rate": 1e-4, "method": method}
        run = build(tmp_path / kind, kind, objective, **options)
        events = list(rig.train(run))
        losses = [event.loss for event in events if isinstance(event, StepDone)]
        told = [event.metrics for event in events if isinstance(event, StepDone | Evaluated)]
        weights = torch.cat([p.detach().flatten() for p in run.trunk.model.parameters() if p.requires_grad])
        ends[kind] = (losses, told, weights)
    losses, told, weights = ends[kinds[0]]
    assert losses[-1] < losses[0]
    assert {"rewards/margins", "rewards/accuracies"} <= set(told[0])
    for kind in kinds[1:]:
        assert losses == pytest.approx(ends[kind][0], rel=1e-6)
        for one, two in zip(told, ends[kind][1], strict=True):
            assert one == pytest.approx(two, rel=1e-5, abs=1e-5)
        assert (weights - ends[kind][2]).abs().max() < 1e-6


def test_the_first_loss_is_log_2(tmp_path: Path) -> None:
    """Policy and reference are one policy before the first step, dropout or not."""
    run = build(tmp_path, "method_off", steps=2)
    first = next(event for event in rig.train(run) if isinstance(event, StepDone))
    assert first.loss == pytest.approx(0.6931472, abs=1e-6)
    assert first.metrics["rewards/margins"] == 0.0


def test_dropout_is_off_where_the_objective_says_so(tmp_path: Path) -> None:
    """And activations are still recomputed: transformers looks at each layer's own mode."""
    for recompute in (False, True):
        run = build(tmp_path / str(recompute), "method_off", steps=1, checkpoint_activations=recompute)
        calls: list[int] = []
        layer = run.trunk.model.model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        list(rig.train(run))
        batches = len(run.stream.step(0))
        assert len(calls) == (3 if recompute else 2) * batches
    run = build(tmp_path / "on", "method_off", Preference(disable_dropout=False), steps=1)
    first = next(event for event in rig.train(run) if isinstance(event, StepDone))
    assert first.metrics["rewards/margins"] == 0.0  # B is zero: dropped or not, the adapter adds nothing
    train_mode(run.trunk.model, dropout=True)
    moved(run)
    batch = run.stream.step(0)[0]
    assert (run.trunk.logprobs(batch) - run.trunk.logprobs(batch)).abs().max() > 0
    train_mode(run.trunk.model, dropout=False)
    assert torch.equal(run.trunk.logprobs(batch), run.trunk.logprobs(batch))


def test_statistics_do_not_depend_on_the_split(tmp_path: Path) -> None:
    found = []
    for name, size in (("whole", None), ("split", 30)):
        run = build(tmp_path / name, "method_off", Shifted(), steps=4, microbatch_tokens=size, learning_rate=1e-2)
        found.append([(e.loss, e.metrics["kl"]) for e in rig.train(run) if isinstance(e, StepDone)])
    for one, two in zip(*found, strict=True):
        assert one == pytest.approx(two, rel=2e-4, abs=1e-6)
    assert any(kl > 0 for _, kl in found[0][1:])


def test_a_reference_that_is_not_finite_names_the_row(tmp_path: Path) -> None:
    run = build(tmp_path, "method_off")
    inner = run.reference
    assert inner is not None

    class Spoilt(MethodOff):
        def logprobs(self, batch: Batch) -> Tensor:
            found = inner.logprobs(batch).clone()
            wanted = next((i for i, source in enumerate(batch.sources) if source.line == 5), None)
            if wanted is not None:
                found[batch.group_Q[batch.sequence_N] == wanted] = float("nan")
            return found

    run.reference = Spoilt(run.trunk, run.method, run.precision)
    with pytest.raises(NumericError, match=r"reference.*pairs\.jsonl:5") as caught:
        list(rig.train(run))
    assert caught.value.exit_code == 6


def test_what_auto_takes_and_what_cannot_be() -> None:
    samples = pair_samples(4)
    assert choose(Preference(), LoRA(), samples) == "method_off"
    assert choose(Preference(), Full(), samples) == "cached"
    assert choose(Shifted(), Full(), samples) == "frozen_copy"
    with pytest.raises(RecipeError, match="made anew in each step"):
        choose(Shifted(reference="cached"), LoRA(), samples)
    assert choose(Preference(reference="frozen_copy"), LoRA(), samples) == "frozen_copy"
    with pytest.raises(RecipeError, match=r"objective\.reference"):
        choose(Preference(reference="method_off"), Full(), samples)
    with pytest.raises(RecipeError, match="no such reference"):
        choose(Preference(reference="memory"), LoRA(), samples)
