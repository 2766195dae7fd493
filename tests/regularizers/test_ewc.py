"""EWC: Fisher information of linear and logistic regression in closed form, and of a tiny model row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine import rig
from luthier.contracts.errors import NumericError, RecipeError
from luthier.contracts.event import Noted, Scoring
from luthier.data.collate import collate
from luthier.engine.loop import train
from luthier.engine.modes import at_rest
from luthier.methods.full import Full
from luthier.methods.lora import LoRA
from luthier.models.probe import open_trunk
from luthier.models.sites import AdaptedLinear, named_sites
from luthier.regularizers.ewc import EWC
from regularizers.rig import build
from tiny import tiny


class Line(nn.Module):
    """One linear to one number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)


def test_linear_regression_in_closed_form() -> None:
    """-log p = (y - w x - b)^2 / 2: F_w = mean (error x)^2, F_b = mean error^2."""
    x, y = torch.randn(50, 4), torch.randn(50)
    model, one = Line(4), EWC(ewc_lambda=3.0)
    one.attach(model)
    one.measure(model, (0.5 * (y[i] - model.linear(x[i])[0]) ** 2 for i in range(50)))
    error = (y - model.linear(x)[:, 0]).detach()
    fisher = {"linear.weight": (error[:, None] * x).square().mean(0)[None], "linear.bias": error.square().mean()[None]}
    for name, tensor in one.tensors(model).items():
        torch.testing.assert_close(tensor, fisher[name], atol=1e-6, rtol=1e-5)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape))
    by_hand = 1.5 * sum(float((fisher[n] * (p - start[n]).square()).sum()) for n, p in model.named_parameters())
    assert one.penalty(model).item() == pytest.approx(by_hand, rel=1e-5)


def test_logistic_regression_with_labels_of_its_own_nears_the_true_fisher() -> None:
    """With labels drawn from the model, the empirical Fisher nears mean s (1 - s) x^2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=generator)
    model, one = Line(3), EWC()
    one.attach(model)
    shares = torch.sigmoid(model.linear(x)[:, 0]).detach()
    y = (torch.rand(4000, generator=generator) < shares).float()
    one.measure(model, (functional.binary_cross_entropy_with_logits(model.linear(x[i])[0], y[i]) for i in range(4000)))
    true = ((shares * (1 - shares))[:, None] * x.square()).mean(0)
    torch.testing.assert_close(one.tensors(model)["linear.weight"][0], true, rtol=0.15, atol=0.01)


def test_squares_are_of_single_rows() -> None:
    """Two rows whose gradients cancel: the square of their mean would be zero."""
    model, one = Line(1), EWC()
    one.attach(model)
    out = lambda sign: sign * model.linear(torch.ones(1))[0]
    one.measure(model, (out(sign) for sign in (1.0, -1.0)))
    assert float(one.tensors(model)["linear.weight"]) == pytest.approx(1.0)


def losses(trunk: object, rows: list) -> Iterator[Tensor]:
    for row in rows:
        batch = collate([row])
        yield -trunk.logprobs(batch).dot(batch.weights_N)  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_full_is_brute_force_row_by_row(family: str) -> None:
    model, rows, one = tiny(family), rig.samples(5), EWC()
    Full().attach(model)
    trunk = open_trunk(model)
    one.attach(model)
    one.measure(model, losses(trunk, rows))
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    trunk.close()
    for row in rows:
        tokens, weights = torch.tensor(row.pieces[0].tokens), torch.tensor(row.pieces[0].weights)
        model.zero_grad()
        each = functional.cross_entropy(model(input_ids=tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        (each * weights[1:]).sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                squares[name] += p.grad.square() / len(rows)
    found = one.tensors(model)
    assert set(found) == set(squares)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, squares[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_is_that_of_the_weight_beside_it(family: str) -> None:
    """Equal to what `full` measures there, and its penalty is sum F (s B A)^2."""
    rows, whole, model, one = rig.samples(4), tiny(family), tiny(family), EWC(ewc_lambda=2.0)
    Full().attach(whole)
    LoRA(r=3).attach(model)
    for each in (whole, model):
        one.attach(each)
        one.measure(each, losses(open_trunk(each), rows))
    found, fisher = one.tensors(model), one.tensors(whole)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("base_layer.weight"))
    for path, tensor in found.items():
        torch.testing.assert_close(tensor, fisher[f"{path}.weight"], atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.1)
    by_hand = torch.zeros(())
    for path, site in named_sites(model):
        change = site.delta.weight()
        by_hand = by_hand + (found[path] * (change.T if family == "gpt2" else change).square()).sum()
    penalty = one.penalty(model)
    assert float(penalty) == pytest.approx(float(by_hand), rel=1e-4)
    grown = [p for p in model.parameters() if p.requires_grad]
    for mine, theirs in zip(torch.autograd.grad(penalty, grown), torch.autograd.grad(by_hand, grown), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def test_low_rank_on_an_embedding() -> None:
    model, one = tiny(), EWC(ewc_lambda=2.0)
    LoRA(r=3, target_modules=("embed_tokens",)).attach(model)
    one.attach(model)
    one.measure(model, losses(open_trunk(model), rig.samples(4)))
    ((path, site),) = named_sites(model)
    with torch.no_grad():
        site.delta.lora_A.add_(torch.randn(site.delta.lora_A.shape))
    by_hand = (one.tensors(model)[path] * site.delta.weight().square()).sum()
    assert float(one.penalty(model)) == pytest.approx(float(by_hand), rel=1e-4)


def test_normalised_and_floored() -> None:
    for one in (EWC(normalize="tensor"), EWC(fisher_floor=0.5)):
        model = Line(3)
        one.attach(model)
        one.measure(model, [model.linear(torch.tensor([1.0, 2.0, 0.0]))[0]])
        fisher = one.tensors(model)["linear.weight"][0]
        expected = [0.6, 2.4, 0.0] if one.normalize == "tensor" else [1.0, 4.0, 0.5]
        torch.testing.assert_close(fisher, torch.tensor(expected))


def test_what_cannot_be_measured_is_said() -> None:
    model, one = Line(2), EWC()
    one.attach(model)
    with pytest.raises(RuntimeError, match="not measured"):
        one.penalty(model)
    with pytest.raises(NumericError, match="not finite"):
        one.measure(model, [model.linear(torch.tensor([float("inf"), 1.0]))[0]])
    for wrong in ({"ewc_lambda": -1.0}, {"fisher_rows": 0}, {"normalize": "all"}, {"fisher_floor": -1.0}):
        with pytest.raises(RecipeError, match="cannot be that"):
            EWC(**wrong)

    class Packed(nn.Linear):
        """Stands for a quantised linear: no ordinary weight."""

        def __init__(self) -> None:
            super().__init__(64, 64, bias=False)
            self.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.uint8), requires_grad=False)

    quantised = tiny()
    LoRA(r=2, target_modules=("q_proj",)).attach(quantised)
    site = next(module for module in quantised.modules() if isinstance(module, AdaptedLinear))
    site.base_layer = Packed()
    with pytest.raises(RecipeError, match="no ordinary weight"):
        EWC().attach(quantised)


def test_a_run_keeps_what_it_measured_and_takes_it_up(tmp_path: Path) -> None:
    list(train(build(tmp_path, [EWC()], steps=6)))
    (kept,) = (tmp_path / "measured").glob("*.safetensors")
    before = kept.read_bytes()
    events = list(train(build(tmp_path, [EWC()], steps=6, resume="auto")))
    assert any(isinstance(event, Noted) and "is taken from" in event.text for event in events)
    kept.write_bytes(before[:-1])
    events = list(train(build(tmp_path, [EWC()], steps=6, resume="auto")))
    assert any(isinstance(event, Noted) and "measured again" in event.text for event in events)
    assert any(isinstance(event, Scoring) for event in events)
    assert kept.read_bytes() == before


def test_a_strong_pull_keeps_the_old_task(tmp_path: Path) -> None:
    """What was learnt first is lost without EWC and mostly kept with it; the rows of the first task are measured."""
    lost = {}
    old = rig.samples(24, seed=1)
    for strength in (0.0, 1000.0):
        run = build(tmp_path / str(strength), [], method="full", steps=40, evaluation=0, learning_rate=5e-3)
        model = run.trunk.model
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(30):  # the first task: repeat the prompt, backwards
            optimizer.zero_grad()
            batch = collate([backwards(row) for row in old])
            (-run.trunk.logprobs(batch).mean()).backward()
            optimizer.step()
        before = score(run, [backwards(row) for row in old])
        one = EWC(ewc_lambda=strength)
        one.attach(model)
        run.regularizers, run.measured = [one], [(one, [backwards(row) for row in old])]
        list(train(run))
        lost[strength] = score(run, [backwards(row) for row in old]) - before
    assert lost[0.0] > 0.2
    assert lost[1000.0] < 0.5 * lost[0.0], lost


def backwards(row: object) -> object:
    piece = row.pieces[0]  # type: ignore[attr-defined]
    prompt = [token for token, weight in zip(piece.tokens, piece.weights, strict=True) if not weight]
    tokens = prompt + list(reversed(prompt[1:])) + [260]
    return replace(row, pieces=(replace(piece, tokens=tokens),))  # type: ignore[type-var]


def score(run: object, rows: list) -> float:
    with torch.no_grad(), at_rest(run.trunk.model):  # type: ignore[attr-defined]
        return float(-run.trunk.logprobs(collate(rows)).mean())  # type: ignore[attr-defined]
