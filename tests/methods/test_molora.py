"""MoLoRA against oracles: a loop over tokens and experts, PEFT's LoRA for one expert, autograd for the balance term.

The balance loss itself is held to transformers' in tests/models/test_expert_mixture.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine import rig
from luthier.contracts.batch import Batch, Forest
from luthier.contracts.errors import ModelError, RecipeError
from luthier.contracts.objective import Scored
from luthier.data.pack import collate
from luthier.engine.memory import checkpoint_activations
from luthier.engine.precision import resolve_precision
from luthier.engine.strategy.single import Single
from luthier.methods.molora import MoLoRA
from luthier.models.probe import open_trunk
from luthier.models.routed import Experts, RoutedBlock, Router, routers
from luthier.models.sites import AdaptedLinear
from luthier.objectives.sft import SFT
from methods.rig import TOKENS, base, logits, sample, shared_as_batches, stir, train
from tiny_families import family

MLP = ("gate_proj", "up_proj", "down_proj")


def attached(name: str = "llama", **changes: Any) -> tuple[MoLoRA, nn.Module]:
    """Attached to a fresh model, everything that trains stirred, routers enough to differ between tokens."""
    torch.manual_seed(0)
    method, model = MoLoRA(**{"num_experts": 4, "r": 3, **changes}), base(name)
    method.attach(model)
    stir(model)
    return method, model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# ------------------------------------------------------------------ the mixture


class Loop(nn.Module):
    """A Llama's feed-forward block with experts, token by token and expert by expert: the definition."""

    def __init__(self, mlp: Any, top_k: int, renormalise: bool, router: Router | None) -> None:
        super().__init__()
        self.mlp, self.top_k, self.renormalise, self.router = mlp, top_k, renormalise, router

    def gates(self, router: Router, h_D: Tensor) -> list[tuple[int, Tensor]]:
        probabilities = torch.softmax(router.weight @ h_D, 0)
        chosen = torch.argsort(probabilities, descending=True)[: self.top_k].tolist()
        whole = sum(probabilities[e] for e in chosen) if self.renormalise else 1.0
        return [(e, probabilities[e] / whole) for e in chosen]

    def linear(self, name: str, x_D: Tensor, gates: list[tuple[int, Tensor]] | None) -> Tensor:
        site = getattr(self.mlp, name)
        delta = site.delta
        y = site.base_layer.weight @ x_D
        for e, gate in self.gates(delta.router, x_D) if gates is None else gates:
            y = y + delta.scale * gate * (delta.lora_B[e] @ (delta.lora_A[e] @ x_D))
        return y

    def forward(self, x: Tensor) -> Tensor:
        made = []
        for h_D in x.reshape(-1, x.shape[-1]):
            gates = None if self.router is None else self.gates(self.router, h_D)
            up = nn.functional.silu(self.linear("gate_proj", h_D, gates)) * self.linear("up_proj", h_D, gates)
            made.append(self.linear("down_proj", up, gates))
        return torch.stack(made).view(x.shape)


@pytest.mark.parametrize("scope", ["block", "linear"])
@pytest.mark.parametrize(("top_k", "renormalise"), [(2, True), (1, False), (3, False), (4, True)])
def test_logits_and_gradients_are_those_of_a_loop(scope: str, top_k: int, renormalise: bool) -> None:
    _, model = attached(target_modules=MLP, router_scope=scope, top_k=top_k, norm_topk_prob=renormalise)
    fast = model(input_ids=TOKENS).logits
    fast.square().mean().backward()
    mine = gradients(model)
    parameters = dict(model.named_parameters())
    for layer in model.model.layers:  # type: ignore[union-attr]
        site = layer.mlp
        block, router = (site.base_layer, site.delta) if scope == "block" else (site, None)
        layer.mlp = Loop(block, top_k, renormalise, router)
    slow = model(input_ids=TOKENS).logits
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    slow.square().mean().backward()
    assert len(mine) == len([p for p in parameters.values() if p.requires_grad])
    for name, grad in mine.items():
        torch.testing.assert_close(grad, parameters[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scope", ["block", "linear"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_one_expert_is_lora_as_peft_has_it(scope: str, name: str) -> None:
    peft = pytest.importorskip("peft")
    oracle = peft.get_peft_model(
        base(name), peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear")
    )
    stir(oracle)
    oracle.eval()
    method, model = MoLoRA(num_experts=1, top_k=1, r=4, lora_alpha=6, router_scope=scope), base(name)
    method.attach(model)
    theirs = peft.get_peft_model_state_dict(oracle)
    own = method.tensors(model)
    renamed = lambda key: key.replace(".0.weight", ".weight") if ".lora_A.0." in key or ".lora_B.0." in key else key
    method.load(model, {key: own[key] if ".lora_router." in key else theirs[renamed(key)] for key in own})
    mine, right = model(input_ids=TOKENS).logits, oracle(input_ids=TOKENS).logits
    torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
    mine.square().mean().backward()
    right.square().mean().backward()
    grads = {
        key.replace(".default", "").removeprefix("base_model.model."): p.grad for key, p in oracle.named_parameters()
    }
    pairs = [(path, site) for path, site in model.named_modules() if isinstance(site, AdaptedLinear)]
    assert len(pairs) == sum(key.endswith("lora_A.weight") for key in theirs)
    for path, site in pairs:
        for part in ("lora_A", "lora_B"):
            expected = grads[f"{path.replace('base_layer.', '')}.{part}.weight"]
            grad = getattr(site.delta, part).grad.reshape(expected.shape)
            torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=path: f"{n}: {m}")


def test_one_expert_alone_is_what_export_writes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    method, model = attached("qwen2", num_experts=3)
    made = method.export(model, tmp_path / "experts", "tiny")
    assert [path.name for path in made] == ["expert_0", "expert_1", "expert_2"]
    routing = load_file(tmp_path / "experts" / "router.safetensors")
    assert routing.keys() == {name for name in method.tensors(model) if ".lora_router." in name}
    for expert, path in enumerate(made):
        with only(model, expert):
            expected = logits(model)
        oracle = peft.PeftModel.from_pretrained(base("qwen2"), path)
        torch.testing.assert_close(logits(oracle), expected, atol=1e-5, rtol=1e-4)
        assert json.loads((path / "adapter_config.json").read_text())["peft_type"] == "LORA"


@contextmanager
def only(model: nn.Module, expert: int) -> Iterator[None]:
    """Every router sends every token to one expert, with gate 1."""
    before = {router: router.forward for router in routers(model)}
    for router in before:
        gates = torch.eye(router.weight.shape[0])[expert]
        router.forward = lambda x, gates=gates: gates.expand(x.numel() // x.shape[-1], -1)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for router, forward in before.items():
            router.forward = forward  # type: ignore[method-assign]


# ------------------------------------------------------------------ the balance loss over a step

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


# ------------------------------------------------------------------ where it goes, and what it refuses


def test_block_scope_has_a_router_per_block_and_plain_lora_in_attention() -> None:
    _, model = attached()
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, (RoutedBlock, AdaptedLinear))}
    assert [name for name, kind in kinds.items() if kind == "RoutedBlock"] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            assert isinstance(module.delta, Experts) == ("mlp" in name)
    assert len(routers(model)) == 2
    assert all(router.weight.dtype == torch.float32 for router in routers(model))


def test_linear_scope_has_a_router_at_every_target() -> None:
    _, model = attached("qwen3_moe", router_scope="linear")
    linears = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    assert len(linears) == len(routers(model)) == 8


def test_an_excluded_block_has_no_router() -> None:
    _, model = attached(exclude_modules=("model.layers.1.mlp", "gate_proj"))
    assert len(routers(model)) == 1


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"top_k": 9}, "method.top_k"),
        ({"num_experts": 0}, "method.num_experts"),
        ({"top_k": 1}, "method.norm_topk_prob"),
        ({"router_scope": "layer"}, "method.router_scope"),
        ({"router_aux_loss_coef": -0.1}, "method.router_aux_loss_coef"),
        ({"router_jitter_noise": 1.0}, "method.router_jitter_noise"),
        ({"r": 0}, "method.r"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(RecipeError) as caught:
        MoLoRA(**fields)
    assert caught.value.where == place
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("qwen3_moe", {}, "experts of its own"),
        ("llama", {"target_modules": ("q_proj",)}, "no target lies in a feed-forward block"),
        ("llama", {"target_modules": ("embed_tokens", "up_proj")}, "looks up ids"),
        ("llama", {"target_modules": ("lm_head",), "router_scope": "linear"}, "scored tokens only"),
        ("gpt2", {"target_modules": ("lm_head", "c_fc")}, "silently untied"),
        ("mamba", {}, "feed-forward block"),
    ],
)
def test_places_without_a_router_are_refused(name: str, fields: dict[str, Any], words: str) -> None:
    model = family(name)
    before = list(model.state_dict())
    with pytest.raises(RecipeError, match=words) as caught:
        MoLoRA(**fields).attach(model)
    assert caught.value.remedy
    assert list(model.state_dict()) == before


def test_experts_that_see_other_rows_say_so() -> None:
    _, model = attached()
    block = model.model.layers[0].mlp  # type: ignore[union-attr, index]
    with pytest.raises(ModelError, match="outside its block"):
        block.base_layer(torch.zeros(1, 3, 64))


def test_router_stays_fp32_over_bf16() -> None:
    method, model = MoLoRA(), base("llama").to(torch.bfloat16)
    method.attach(model)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        gates = routers(model)[0](torch.randn(1, 4, 64, dtype=torch.bfloat16))
    assert gates.dtype == torch.float32
