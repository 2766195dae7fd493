"""MoLoRA's balance loss over a whole step: split, packing, shared prompts, recompute, resume; and what it is for.

Oracles: autograd through the definition (the load of the step before in its place), the unpacked path, the loop over
rows. The formula itself is held to transformers' in tests/models/test_expert_mixture.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import rig
from luthier.contracts.batch import Batch, Forest
from luthier.contracts.objective import Scored
from luthier.data.collate import collate
from luthier.engine.memory import checkpoint_activations
from luthier.engine.precision import resolve_precision
from luthier.engine.strategy.single import Single
from luthier.methods.molora import MoLoRA
from luthier.models.probe import open_trunk
from luthier.models.routed import Router, routers
from luthier.objectives.sft import SFT
from methods.rig import TOKENS, base, logits, sample, shared_as_batches, train
from methods.test_molora import attached, gradients

LOUD = {"router_aux_loss_coef": 3.0, "router_z_loss_coef": 0.2}


def lean(model: nn.Module) -> None:
    """Another load of the step before for every router, none of them even."""
    generator = torch.Generator().manual_seed(2)
    for router in routers(model):
        router.load_E.copy_(torch.rand(router.load_E.shape, generator=generator))


def step(method: MoLoRA, model: nn.Module, batches: list[Batch], attention: str = "forest") -> tuple[dict, float, dict]:
    """(gradients, penalty, load of the step) as the engine makes them."""
    trunk, strategy, objective = open_trunk(model, attention=attention), rig_strategy(), SFT()
    weight = sum(objective.weight(batch) for batch in batches)
    method.begin_step(model, batches)
    strategy.forward_backward(batches, lambda batch: objective.loss(Scored(trunk.logprobs(batch)), batch, None), weight)
    penalty = strategy.backward(method.penalty(model))
    before = {name: load.clone() for name, load in loads(model).items()}
    method.after_step(model, 1, 1)
    found = gradients(model), penalty, {name: load.clone() for name, load in loads(model).items()}
    trunk.close()
    for name, load in loads(model).items():
        load.copy_(before[name])
    return found


def rig_strategy() -> Single:
    device = torch.device("cpu")
    return Single(device, resolve_precision("fp32", device))


def loads(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("load_E")}


def alike(one: tuple[dict, float, dict], other: tuple[dict, float, dict]) -> None:
    assert one[0].keys() == other[0].keys()
    for name, grad in one[0].items():
        torch.testing.assert_close(grad, other[0][name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert one[1] == pytest.approx(other[1], rel=1e-5)
    for name, load in one[2].items():
        torch.testing.assert_close(load, other[2][name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scope", ["block", "linear"])
def test_split_packing_and_shared_prompts_change_nothing(scope: str) -> None:
    method, model = attached(router_scope=scope, **LOUD)
    lean(model)
    shared, paths = shared_as_batches()
    whole = collate([sample_of(batch, i) for i, batch in enumerate(paths)])
    one = step(method, model, [shared])
    for batches in ([whole], paths, paths[::-1]):
        alike(step(method, model, batches), one)
    alike(step(method, model, [shared], "unpacked"), one)
    tokens = sum(batch.tokens for batch in paths)
    assert shared.forest.path_tokens == tokens > shared.tokens
    for load in one[2].values():
        assert float(load.sum()) == pytest.approx(method.top_k, rel=1e-6)  # every token, in the last layer too


def sample_of(batch: Batch, index: int) -> Any:
    """The row that a batch of one row was made of: all its tokens, those scored that were."""
    made = sample(batch.tokens_T.tolist(), index)
    weights = [0.0] * batch.tokens
    for at, weight in zip(batch.scored_N.tolist(), batch.weights_N.tolist(), strict=True):
        weights[at + 1] = weight
    made.pieces[0].weights[:] = weights
    return made


def test_the_gradient_is_autograds_of_the_loss_with_the_load_before() -> None:
    """Through the hidden rows into everything below, not only into the router."""
    method, model = attached(**LOUD)
    lean(model)
    rows, _ = shared_as_batches()
    one = step(method, model, [rows])
    plain = MoLoRA(num_experts=4, r=3, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    for router in routers(model):
        router.balance_coefficient = router.z_coefficient = 0.0
    without = step(plain, model, [rows])
    assert without[1] == 0.0
    lengths = torch.tensor([end - start for start, end in zip(rows.forest.start, rows.forest.end, strict=True)])
    times_T = torch.tensor(rows.forest.paths_S).repeat_interleave(lengths)
    seen: list[tuple[Router, Tensor]] = []
    hooks = [r.register_forward_hook(lambda m, args, out: seen.append((m, args[0][0]))) for r in routers(model)]
    trunk = open_trunk(model)
    seen.clear()
    model.luthier_every_row = True
    trunk.logprobs(rows)
    model.luthier_every_row = False
    for hook in hooks:
        hook.remove()
    total, exact = torch.zeros(()), 0.0
    for router, x_TD in seen:
        scores = x_TD @ router.weight.T
        mean_E = (scores.softmax(-1) * times_T[:, None]).sum(0) / times_T.sum()
        z = (torch.logsumexp(scores, -1).square() * times_T).sum() / times_T.sum()
        total = total + (3.0 * 4 * torch.dot(router.load_E, mean_E) + 0.2 * z) / len(seen)
        chosen = torch.zeros_like(scores).scatter_(1, scores.topk(2, -1).indices, 1.0) * times_T[:, None]
        exact += float(3.0 * 4 * torch.dot(chosen.sum(0) / times_T.sum(), mean_E.detach()) + 0.2 * z.detach()) / len(
            seen
        )
    assert len(seen) == 2
    total.backward()
    added = gradients(model)
    assert one[1] == pytest.approx(exact, rel=1e-5)  # the value that is told has the step's own load
    below = [name for name in added if "layers.0" in name and "router" not in name and "delta.weight" not in name]
    assert below
    for name, grad in one[0].items():
        expected = without[0][name] + added.get(name, torch.zeros(()))
        torch.testing.assert_close(grad, expected, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_recomputed_activations_count_once_and_draw_the_same(jitter: float) -> None:
    found = []
    for recompute in (False, True):
        method, model = attached(router_jitter_noise=jitter, lora_dropout=0.1, **LOUD)
        lean(model)
        model.train()
        if recompute:
            assert checkpoint_activations(model)
        shared, _ = shared_as_batches()
        torch.manual_seed(7)
        found.append(step(method, model, [shared]))
    alike(*found)


def test_jitter_only_in_training() -> None:
    _, model = attached(router_jitter_noise=0.5)
    quiet = logits(model)
    assert torch.equal(logits(model), quiet)
    model.train()
    assert not torch.equal(logits(model), quiet)


def test_nothing_is_counted_outside_a_step_or_without_gradients() -> None:
    method, model = attached(**LOUD)
    model(input_ids=TOKENS).logits.sum().backward()
    assert all(float(router.counts_E.sum()) == 0 for router in routers(model))
    assert method.penalty(model) == 0.0
    method.begin_step(model, [collate([sample(row, i) for i, row in enumerate(TOKENS.tolist())])])
    logits(model)
    assert all(float(router.counts_E.sum()) == 0 for router in routers(model))
    model(input_ids=TOKENS).logits.sum().backward()
    assert all(float(router.counts_E.sum()) == 2 * TOKENS.numel() for router in routers(model))
    method.begin_step(model, [])  # a step that starts anew
    assert all(float(router.counts_E.sum()) == 0 for router in routers(model))


def test_paths_of_a_forest() -> None:
    forest = Forest((0, 2, 3, 5, 6), (2, 3, 5, 6, 10), (-1, 0, 0, 2, 2))
    assert forest.paths_S == (3, 1, 2, 1, 1)
    assert forest.path_tokens == 3 * 2 + 1 + 2 * 2 + 1 + 4


@pytest.mark.parametrize(("coefficient", "even"), [(0.0, False), (0.01, True)])
def test_the_balance_loss_keeps_experts_in_use(coefficient: float, even: bool) -> None:
    """From routers that send every token to the same two; 0.01 is the default."""
    method = MoLoRA(num_experts=4, r=2, router_aux_loss_coef=coefficient, router_z_loss_coef=0.0)
    torch.manual_seed(0)
    model = base("llama")
    method.attach(model)
    seen: list[Tensor] = []
    hooks = [router.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for router in routers(model)]
    logits(model)
    for router, x in zip(routers(model), seen, strict=True):
        mean_D = x.flatten(0, -2).mean(0)
        with torch.no_grad():
            router.weight[:2] += 0.5 * mean_D / mean_D.norm()
    for hook in hooks:
        hook.remove()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    train(method, model, 60, optim=optimizer)
    assert (method.least_load(model) > 0.4) == even


# ------------------------------------------------------------------ in the engine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    method = MoLoRA(num_experts=4, r=2, router_jitter_noise=0.1, lora_dropout=0.1)
    monkeypatch.setitem(rig.METHODS, "molora", method)
    return rig


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(engine: Any, tmp_path: Path) -> None:
    options = dict(method="molora", every=None, evaluation=0)
    events = engine.run_through(tmp_path / "whole", **options)
    for event in engine.train(engine.build(tmp_path / "cut", **options)):
        if getattr(event, "step", 0) == 7:
            break
    engine.run_through(tmp_path / "cut", resume="auto", **options)
    assert engine.final_digests(tmp_path / "cut") == engine.final_digests(tmp_path / "whole")
    told = [event.metrics["penalty"] for event in events if hasattr(event, "metrics")]
    assert len(told) == 12
    assert all(0.019 < value < 0.05 for value in told)  # 0.01 x 2 at an even load, and the z-loss


def test_microbatches_of_another_size_end_in_the_same_weights(engine: Any, tmp_path: Path, monkeypatch: Any) -> None:
    quiet = MoLoRA(num_experts=4, r=2, router_aux_loss_coef=0.5)
    monkeypatch.setitem(engine.METHODS, "molora", quiet)
    found = []
    for tokens in (40, 160):
        run = engine.build(tmp_path / str(tokens), method="molora", microbatch_tokens=tokens, evaluation=0, every=None,
                           learning_rate=1e-3)  # fmt: skip
        list(engine.train(run))
        found.append({name: t.clone() for name, t in quiet.tensors(run.trunk.model).items()})
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
