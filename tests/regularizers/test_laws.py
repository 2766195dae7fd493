"""The laws of regularizers over every file of the folder: a new one is covered by being there.

Beside full weights and beside LoRA: no effect in eval mode, `detach` gives back the very model, files and checkpoints
are those of a run without it, a resumed run ends in the same bits, and it does something.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine import rig as engine
from luthier.artifact.adapter import save_adapter
from luthier.contracts.errors import RecipeError
from luthier.contracts.method import trains
from luthier.contracts.regularizer import Regularizer, adds_penalty
from luthier.engine.checkpoint import load
from luthier.engine.journal import metric_rows, read
from luthier.engine.loop import train
from luthier.engine.modes import at_rest, train_mode
from luthier.engine.state import trained_tensors
from luthier.engine.strategy.in_backward import check_in_backward
from luthier.recipe import resolve
from regularizers.rig import FAMILIES, METHODS, NAMES, attached, build, default, run_to_save
from tiny import tiny

TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(3))
Made = tuple[Regularizer, nn.Module, str]


@pytest.fixture(params=[(n, m, f) for n in NAMES for m in METHODS for f in FAMILIES], ids="-".join)
def made(request: pytest.FixtureRequest) -> Made:
    name, method, family = request.param
    return default(name), attached(method, family)[1], method


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def losses(model: nn.Module) -> Iterable[Tensor]:
    for row in TOKENS:
        scores = model(input_ids=row[None]).logits[0, :-1].float()
        yield nn.functional.cross_entropy(scores, row[1:], reduction="sum")


def joined(one: Regularizer, model: nn.Module) -> None:
    one.attach(model)
    with at_rest(model):
        one.measure(model, losses(model))


def stir(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def look(model: nn.Module) -> dict[str, object]:
    """Everything that an attach could leave behind."""
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        found[path] = (type(module), sorted(module.__dict__), sorted(module._buffers), len(module._forward_hooks))
    found["grown"] = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return found


def test_every_regularizer_is_discovered() -> None:
    assert {"neftune", "ewc", "l2sp"} <= set(NAMES)
    assert all(default(name).paper for name in NAMES)


def test_no_effect_in_eval(made: Made) -> None:
    one, model, _ = made
    before = logits(model)
    joined(one, model)
    assert torch.equal(logits(model), before)


def test_detach_gives_back_the_very_model(made: Made) -> None:
    one, model, _ = made
    before, state = look(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    joined(one, model)
    one.detach(model)
    assert look(model) == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    train_mode(model, dropout=False)
    drawn = torch.get_rng_state()
    logits(model)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_state_and_checkpoints_know_nothing_of_it(made: Made) -> None:
    one, model, _ = made
    before, names = list(trained_tensors(model)), list(model.state_dict())
    joined(one, model)
    assert list(trained_tensors(model)) == before
    assert list(model.state_dict()) == names


def test_the_penalty_starts_at_zero_and_pulls_back(made: Made) -> None:
    one, model, _ = made
    joined(one, model)
    assert float(one.penalty(model)) == 0.0
    stir(model)
    found = one.penalty(model)
    assert adds_penalty(one) == (float(found) > 0)
    if isinstance(found, Tensor):
        grown = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(found, grown, allow_unused=True)
        with torch.no_grad():
            for parameter, slope in zip(grown, slopes, strict=True):
                if slope is not None:
                    assert torch.isfinite(slope).all()
                    parameter -= 1e-3 * slope / max(1.0, float(slope.norm()))
        assert float(one.penalty(model)) < float(found)


def test_what_was_measured_comes_back(made: Made) -> None:
    one, model, _ = made
    twin = copy.deepcopy(model)
    joined(one, model)
    one.attach(twin)
    one.load(twin, {name: tensor.clone() for name, tensor in one.tensors(model).items()})
    stir(model)
    stir(twin)
    assert float(one.penalty(twin)) == float(one.penalty(model))
    if tensors := one.tensors(model):
        first = next(iter(tensors))
        with pytest.raises(ValueError, match="other tensors"):
            one.load(twin, {name: t for name, t in tensors.items() if name != first})
        with pytest.raises(ValueError, match="another shape"):
            one.load(twin, {**tensors, first: tensors[first][..., :-1]})


def test_a_copy_of_the_model_has_its_own(made: Made) -> None:
    one, model, _ = made
    joined(one, model)
    twin = copy.deepcopy(model)
    stir(twin)
    assert float(one.penalty(model)) == 0.0
    one.detach(twin)
    stir(model)
    assert adds_penalty(one) == (float(one.penalty(model)) > 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", resolve.names("methods"))
def test_beside_every_method_there_is(name: str, method: str) -> None:
    """Zero at the start (but for rounding), more after a change, and out again; whatever the method trains."""
    one, model = default(name), tiny()
    torch.manual_seed(0)
    try:
        made = resolve.load("methods", method)()
        made.check(model)
        made.attach(model)
    except RecipeError as error:
        pytest.skip(error.line())
    state = list(model.state_dict())
    joined(one, model)
    rounding = float(one.penalty(model))
    assert rounding == pytest.approx(0.0, abs=1e-4)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if trains(p)):
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    found = float(one.penalty(model))
    assert adds_penalty(one) == (found > 10 * rounding + 1e-6)
    one.detach(model)
    assert list(model.state_dict()) == state
    assert not [name for name, _ in model.named_buffers() if "luthier_l2sp" in name or "luthier_ewc" in name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_it_does_something_and_the_loss_falls(name: str, method: str, tmp_path: Path) -> None:
    rows = {}
    for kind in ("with", "without"):
        run = build(tmp_path / kind, [default(name)] if kind == "with" else [], method=method, steps=20, evaluation=0)
        list(train(run))
        rows[kind] = [row["loss"] for row in read(tmp_path / kind / "journal.jsonl") if row["event"] == "step"]
    assert rows["with"] != rows["without"]
    assert rows["with"][-1] < rows["with"][0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_in_the_same_bits(name: str, method: str, tmp_path: Path) -> None:
    list(train(build(tmp_path / "unbroken", [default(name)], method=method)))
    run_to_save(build(tmp_path / "broken", [default(name)], method=method), 6)
    list(train(build(tmp_path / "broken", [default(name)], method=method, resume="auto")))
    assert engine.final_digests(tmp_path / "broken") == engine.final_digests(tmp_path / "unbroken")
    assert metric_rows(tmp_path / "broken" / "journal.jsonl") == metric_rows(tmp_path / "unbroken" / "journal.jsonl")


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_and_the_adapter_are_those_of_a_run_without(name: str, tmp_path: Path) -> None:
    shapes, files = {}, {}
    for kind in ("with", "without"):
        run = build(tmp_path / kind, [default(name)] if kind == "with" else [], steps=3, evaluation=0)
        list(train(run))
        weights = load(tmp_path / kind / "checkpoint-3").weights
        shapes[kind] = {key: (tensor.shape, tensor.dtype) for key, tensor in weights.items()}
        save_adapter(tmp_path / kind / "adapter", run.method, run.trunk.model, base_path="tiny")
        files[kind] = {path.name: path.stat().st_size for path in (tmp_path / kind / "adapter").iterdir()}
    assert shapes["with"] == shapes["without"]
    assert files["with"] == files["without"]


@pytest.mark.parametrize("name", NAMES)
def test_a_penalty_does_not_go_with_updates_in_backward(name: str) -> None:
    one, (method, _) = default(name), attached("full")
    if adds_penalty(one):
        with pytest.raises(RecipeError, match="too late"):
            check_in_backward(method, 0.0, [one])
    else:
        check_in_backward(method, 0.0, [one])
