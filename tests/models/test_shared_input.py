"""Groups of sites that read one input: found without names, equal to sites alone, and left alone where they must be."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.methods.lora import LoRA
from luthier.models.probe import probe_batch
from luthier.models.shared_input import adapted
from luthier.models.sites import AdaptedLinear, named_sites, switched_off
from luthier.models.trunk import Trunk
from tiny import VOCABULARY, tiny
from tiny_families import family


def attached(name: str = "llama", **settings) -> nn.Module:
    model = family(name)
    LoRA(**{"r": 4, "init_lora_weights": False, **settings}).attach(model)
    return model


def groups(model: nn.Module) -> list[tuple[str, ...]]:
    leaf = {id(site): path.rpartition(".")[2] for path, site in named_sites(model)}
    found = {id(site.shared): site.shared for _, site in named_sites(model)}
    return sorted({tuple(leaf[id(site)] for site in group.sites) for group in found.values()})


def alone(model: nn.Module) -> nn.Module:
    """The same model, every site by itself on the path that calls base and delta."""
    other = copy.deepcopy(model)
    for _, site in named_sites(other):
        site.shared = None
    return other


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    batch, trunk = probe_batch(VOCABULARY), Trunk(model)
    torch.manual_seed(5)
    logprobs_N = trunk.logprobs(batch)
    (logprobs_N * batch.weights_N).sum().backward()
    trunk.close()
    return logprobs_N.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, other: nn.Module) -> None:
    (mine, gradients), (theirs, expected) = step(model), step(other)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)
    assert gradients.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, right in expected.items():
        assert (gradients[name] - right).abs().max() <= 1e-5 * (right.abs().max() + 0.1 * largest), name


def calls(model: nn.Module) -> int:
    """How many frozen linears are called in one pass, not read."""
    count: list[int] = []
    hooks = [s.delta.register_forward_hook(lambda *_: count.append(1)) for _, s in named_sites(model)]
    together = sum(adapted(site) is not None for _, site in named_sites(model))
    assert together == 0  # a hook alone keeps a site on the path that calls
    step(model)
    for hook in hooks:
        hook.remove()
    return len(count)


def test_groups_are_found_without_names() -> None:
    assert groups(attached()) == [("down_proj",), ("gate_proj", "up_proj"), ("o_proj",), ("q_proj", "k_proj", "v_proj")]
    assert groups(attached(target_modules=("v_proj", "q_proj"))) == [("q_proj", "v_proj")]
    assert ("q_a_proj", "kv_a_proj_with_mqa") in groups(attached("deepseek_v3"))
    assert all(len(group) == 1 for group in groups(attached("gpt2")))  # one product for q, k and v there


def test_experts_that_no_token_chose_are_grouped_like_the_others() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    model = tiny("llama")
    model.model.layers[0].mlp.used, model.model.layers[0].mlp.idle = Expert(), Expert()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: [m.used(args[0][..., :4])].clear())
    LoRA(r=2, target_modules=("a", "b")).attach(model)
    assert groups(model) == [("a", "b")]
    assert len(model.model.layers[0].mlp.idle.a.shared.sites) == 2


@pytest.mark.parametrize("name", ["llama", "qwen2", "deepseek_v3", "qwen3_moe"])
def test_equal_to_sites_alone(name: str) -> None:
    model = attached(name, rank_pattern={"k_proj": 3}, alpha_pattern={"v_proj": 5.0})
    assert_same(model, alone(model))


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.3}, {"lora_bias": True}, {"bias": "all"}])
def test_what_is_more_than_a_pair_takes_the_other_path(settings: dict) -> None:
    model = attached("qwen2", **settings).train()
    left = [adapted(site) is not None for path, site in named_sites(model) if "q_proj" in path]
    assert not any(left)
    assert_same(model, alone(model))


def test_hooks_on_base_or_delta_are_honoured() -> None:
    model = attached()
    assert calls(model) == len(list(named_sites(model)))
    site = model.model.layers[1].self_attn.q_proj
    seen: list[Tensor] = []
    site.base_layer.register_forward_hook(lambda m, args, out: seen.append(out))
    step(model)
    assert len(seen) == 1


def test_another_tensor_a_changed_one_or_another_mode_is_computed_alone() -> None:
    model = attached()
    attention = model.model.layers[0].self_attn
    q, k = attention.q_proj, attention.k_proj
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    with torch.no_grad():
        expected, expected_other = alone(model).model.layers[0].self_attn.k_proj(x), k(other)
        q(x)
        assert torch.equal(k(other), expected_other)
        q(x)
        torch.testing.assert_close(k(x), expected)
        q(x)
        x.mul_(2)
        torch.testing.assert_close(k(x), 2 * expected)
        q(x)
    assert k(x).requires_grad  # not the result that was made without gradients
    first, again = q(x), q(x)
    assert first is not again


def test_switched_off_is_exactly_the_base_and_nothing_waits_after_a_pass() -> None:
    model, base = attached(), family("llama")
    ids = torch.arange(3, 20)[None]
    on = model(ids).logits
    with switched_off(model):
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert torch.equal(model(ids).logits, on)
    assert all(site.shared.left is None for _, site in named_sites(model) if isinstance(site, AdaptedLinear))


def test_autocast_gives_what_sites_alone_give() -> None:
    model = attached().to(torch.bfloat16)
    for _, site in named_sites(model):
        site.delta.float()
    ids, results = torch.arange(3, 40)[None], []
    for which in (model, alone(model)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = which(ids).logits
        logits.float().square().mean().backward()
        results.append([logits, *(p.grad for p in which.parameters() if p.requires_grad)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).float().norm() <= 3e-2 * theirs.float().norm()


class Products(TorchDispatchMode):
    """Counts, for every weight, the matrix products that read it, and the products of a weight's shape."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {tensor.data_ptr(): name for name, tensor in weights.items()}
        self.reads: Counter[str] = Counter()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
            self.reads.update(
                self.names[a.data_ptr()] for a in args if isinstance(a, Tensor) and a.data_ptr() in self.names
            )
            self.shapes.update([tuple(out.shape)])
        return out


def test_no_product_is_made_that_nobody_needs() -> None:
    """Backward reads a frozen weight once, for dx, above the first trainable sites; no gradient of a frozen weight."""
    model = attached(layers_to_transform=[1])
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad and p.ndim == 2}
    batch, trunk = probe_batch(VOCABULARY, (-1, -1), (20, 31)), Trunk(model)
    logprobs_N = trunk.logprobs(batch)
    with Products(frozen) as made:
        logprobs_N.sum().backward()
    trunk.close()
    above = [f"model.layers.1.{name}.base_layer.weight" for name in ("self_attn.o_proj", "mlp.gate_proj")]
    above += [f"model.layers.1.mlp.{name}_proj.base_layer.weight" for name in ("up", "down")]
    assert dict(made.reads) == dict.fromkeys(above, 1)
    assert not {tuple(p.shape) for p in frozen.values()} & made.shapes.keys()
