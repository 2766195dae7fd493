"""DoRA against PEFT (oracle only) and against its plain twins: norms, scaling, gradients, files, merge, dropout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.artifact.adapter import load_adapter, read_adapter, save_adapter
from luthier.contracts.errors import RecipeError
from luthier.methods.dora import DoRA, Magnitude
from luthier.methods.lora import LoRA
from luthier.models.peft_names import live
from luthier.models.row_norms import row_norms, row_norms_plain, row_squares, scaled_rows, scaled_rows_plain
from luthier.models.sites import AdaptedLinear, sites
from methods.rig import TOKENS, base, logits, loss, stir, train

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    family: str
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "some linears": Case("llama", {"target_modules": LINEAR}),
    "all-linear": Case("llama", {"target_modules": "all-linear"}),
    "biases in the base": Case("qwen2", {"target_modules": "all-linear"}),
    "biases that train": Case("qwen2", {"target_modules": LINEAR, "bias": "all"}),
    "Conv1D": Case("gpt2", {"target_modules": "all-linear"}),
    "embedding": Case("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding with padding": Case("qwen2", {"target_modules": ["embed_tokens"]}),
    "head": Case("llama", {"target_modules": ["lm_head"]}),
    "rslora": Case("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": Case(
        "llama", {"target_modules": LINEAR, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 1}}
    ),
    "a mixture of experts": Case("qwen3_moe", {"target_modules": ["q_proj", "o_proj"]}),
    "norms saved whole": Case("llama", {"target_modules": LINEAR, "modules_to_save": ["norm"]}),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def theirs(case: Case, dropout: float = 0.0) -> nn.Module:
    options = {"r": 4, "lora_alpha": 6, "use_dora": True, "lora_dropout": dropout, **case.options}
    model = peft.get_peft_model(base(case.family), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    stir(model)
    return model.eval()


def copied(case: Case, dropout: float = 0.0) -> tuple[DoRA, nn.Module, nn.Module]:
    """Ours with the weights of PEFT's, and PEFT's."""
    oracle = theirs(case, dropout)
    method, model = DoRA(**{"r": 4, "lora_alpha": 6, "lora_dropout": dropout, **case.options}), base(case.family)
    method.attach(model)
    method.load(model, peft.get_peft_model_state_dict(oracle, save_embedding_layers=False))
    return method, model, oracle


def gradients(oracle: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in oracle.named_parameters():
        if p.requires_grad:
            name = name.replace(".default", "").replace(".modules_to_save", "")
            found[name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = p.grad
    return found


def same_gradients(model: nn.Module, oracle: nn.Module) -> None:
    mine, right = model(input_ids=TOKENS).logits, oracle(input_ids=TOKENS).logits
    torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
    mine.square().mean().backward()
    right.square().mean().backward()
    grads = gradients(oracle)
    assert live(model).keys() == grads.keys()
    for name, tensor in live(model).items():
        torch.testing.assert_close(tensor.grad, grads[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert tensor.grad.abs().max() > 0, name


def test_same_start_as_peft(case: Case) -> None:
    options = {"r": 4, "lora_alpha": 6, **case.options}
    oracle = peft.get_peft_model(base(case.family), peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **options))
    model = base(case.family)
    DoRA(**options).attach(model)
    expected = peft.get_peft_model_state_dict(oracle, save_embedding_layers=False)
    assert {name: t.shape for name, t in live(model).items()} == {name: t.shape for name, t in expected.items()}
    for name, tensor in live(model).items():
        if name.endswith("lora_magnitude_vector"):
            torch.testing.assert_close(tensor.detach(), expected[name], atol=1e-6, rtol=1e-6)
    assert torch.equal(logits(model), logits(base(case.family)))


def test_same_logits_and_gradients(case: Case) -> None:
    _, model, oracle = copied(case)
    same_gradients(model, oracle)


@pytest.mark.parametrize("name", ["some linears", "biases in the base", "Conv1D"])
def test_same_with_dropout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base acts on the dropped input too; one mask of positions and widths for both sides, whatever the order."""

    def dropped(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        kept = torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(x.shape[-1])) >= p
        return x * kept / (1 - p) if training and p else x

    monkeypatch.setattr("torch.nn.functional.dropout", dropped)
    _, model, oracle = copied(CASES[name], dropout=0.3)
    quiet = logits(model)
    model.train()
    oracle.train()
    same_gradients(model, oracle)
    assert not torch.allclose(logits(model), quiet, atol=1e-4)


def test_same_merged_weights(case: Case) -> None:
    method, model, oracle = copied(case)
    tuned = logits(model)
    method.merge(model)
    merged = oracle.merge_and_unload().state_dict()
    assert list(model.state_dict()) == list(merged)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits(model), tuned, atol=1e-5, rtol=1e-4)


def test_files_both_ways(case: Case, tmp_path: Path) -> None:
    _, _, oracle = copied(case)
    oracle.save_pretrained(tmp_path / "theirs")
    model, notes = base(case.family), []
    method = load_adapter(tmp_path / "theirs", model, notes=notes)
    assert type(method) is DoRA and not notes
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
    save_adapter(tmp_path / "ours", method, model, base_path="tiny")
    back = peft.PeftModel.from_pretrained(base(case.family), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(model), atol=1e-5, rtol=1e-4)
    first, second = read_adapter(tmp_path / "theirs").tensors, load_file(tmp_path / "ours/adapter_model.safetensors")
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    again = base(case.family)
    load_adapter(tmp_path / "ours", again)
    assert torch.equal(logits(again), logits(model))


def test_a_plain_file_is_no_dora() -> None:
    with pytest.raises(RecipeError, match="magnitudes"):
        DoRA.from_config({"r": 4, "target_modules": LINEAR})


def test_an_extra_bias_is_refused() -> None:
    with pytest.raises(RecipeError, match="lora_bias"):
        DoRA(lora_bias=True)


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_norms_without_the_product(dtype: torch.dtype, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 100 elements, so that half precision really goes through several."""
    monkeypatch.setattr("luthier.models.row_norms._PIECE", 100)
    torch.manual_seed(0)
    weight = torch.randn(24, 40).to(dtype)
    weight = torch.randn(40, 24).to(dtype).T if turned else weight
    a, b = torch.randn(5, 40), torch.randn(24, 5)
    torch.testing.assert_close(row_squares(weight), weight.double().square().sum(1).float())
    fast = row_norms(weight, row_squares(weight), a, b, 0.7)
    exact = (weight.double() + 0.7 * b.double() @ a.double()).square().sum(1).sqrt().float()
    torch.testing.assert_close(fast, exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(row_norms_plain(weight, a, b, 0.7), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("with_bias", [False, True])
def test_scaled_rows_is_its_twin(with_bias: bool) -> None:
    torch.manual_seed(0)
    w, gain = torch.randn(2, 7, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    parts = [w, gain, *([torch.randn(5, dtype=torch.float64)] if with_bias else [])]
    grads = []
    for run in (scaled_rows, scaled_rows_plain):
        leaves = [part.clone().requires_grad_() for part in parts]
        made = run(leaves[0], leaves[1], leaves[2] if with_bias else None)
        made.pow(3).sum().backward()
        grads.append([made.detach(), *(leaf.grad for leaf in leaves)])
    for mine, right in zip(*grads, strict=True):
        torch.testing.assert_close(mine, right)
    ones = torch.ones(5, dtype=torch.float64)
    assert torch.equal(scaled_rows(w, ones, parts[2] if with_bias else None), w)


def test_sites_that_share_an_input_are_computed_together() -> None:
    """And give what each alone gives, gradients too."""
    grads = []
    for together in (True, False):
        model = base("qwen2")
        torch.manual_seed(0)
        DoRA(r=4).attach(model)
        stir(model)
        linears = [site for site in sites(model) if isinstance(site, AdaptedLinear)]
        assert max(len(site.shared.sites) for site in linears) == 3
        for site in linears:
            site.shared = site.shared if together else None
        loss(model).backward()
        grads.append({name: tensor.grad for name, tensor in live(model).items()})
    for name, mine in grads[0].items():
        torch.testing.assert_close(mine, grads[1][name], atol=1e-6, rtol=1e-5)


def test_kept_norms_are_never_old() -> None:
    """Fused optimizers write without a trace: evaluation after a step sees the new norms."""
    method, model = DoRA(r=4), base("llama")
    method.attach(model)
    for _ in range(3):
        train(method, model, 1)
        seen = logits(model)
        assert torch.equal(logits(model), seen)
        fresh = base("llama")
        method.attach(fresh)
        method.load(fresh, method.tensors(model))
        assert torch.equal(logits(fresh), seen)


def test_norms_follow_the_base() -> None:
    """A base put into bf16, or to other numbers, after the adapter was attached."""
    model = base("llama")
    DoRA(r=4, target_modules=["q_proj"]).attach(model)
    site: Any = next(iter(sites(model)))
    logits(model)
    with torch.no_grad():
        site.base_layer.weight.mul_(2)
    torch.testing.assert_close(site.delta.norms(site.base_layer), site.base_layer.weight.norm(dim=1))
    site.base_layer.weight.data = site.base_layer.weight.data.bfloat16()
    right = site.base_layer.weight.detach().float().norm(dim=1)
    torch.testing.assert_close(site.delta.norms(site.base_layer), right)


def test_magnitudes_are_fp32_whatever_the_base_is() -> None:
    model = base("llama").to(torch.bfloat16)
    DoRA(r=4, adapter_dtype="bf16").attach(model)
    made = [site.delta for site in sites(model) if isinstance(site.delta, Magnitude)]
    assert {one.lora_magnitude_vector.dtype for one in made} == {torch.float32}
    assert {one.lora_A.dtype for one in made} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(base("llama").to(torch.bfloat16)))


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_start_is_the_base_in_bf16_under_autocast(family: str) -> None:
    """As a GPU trains: bf16 weights, fp32 adapters, products in bf16; and PEFT's logits within bf16 rounding."""
    oracle = peft.get_peft_model(
        base(family).bfloat16(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=True)
    )
    method, model = DoRA(r=4, lora_alpha=8), base(family).bfloat16()
    method.attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), logits(base(family).bfloat16()))
        stir(oracle, 0.02)
        method.load(model, peft.get_peft_model_state_dict(oracle))
        torch.testing.assert_close(logits(model), logits(oracle), atol=2e-2, rtol=2e-2)
        loss(model).backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in live(model).values())


def test_a_row_of_zeros_stays_finite() -> None:
    model = base("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    untouched = logits(model)
    method = DoRA(r=4)
    method.attach(model)
    torch.testing.assert_close(logits(model), untouched)
    train(method, model)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients(dropout: float) -> None:
    grads = []
    for recompute in (False, True):
        model = base("llama")
        torch.manual_seed(0)
        DoRA(r=4, lora_dropout=dropout).attach(model)
        stir(model)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        loss(model).backward()
        grads.append({name: tensor.grad for name, tensor in live(model).items()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_a_packed_base_is_refused() -> None:
    base_linear = SimpleNamespace(weight=torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(RecipeError, match="rows cannot be measured"):
        DoRA().delta("q_proj", base_linear)


def test_counts_are_lora_and_one_number_a_row() -> None:
    shapes = {}
    for kind in (LoRA, DoRA):
        model = base("llama")
        method = kind(r=4)
        method.attach(model)
        shapes[kind] = method.footprint(model).trainable
    rows = sum(site.out_features for site in sites(model) if isinstance(site, AdaptedLinear))
    assert shapes[DoRA] == shapes[LoRA] + rows
