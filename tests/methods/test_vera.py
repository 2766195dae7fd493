"""VeRA against PEFT (oracle only): the drawn pair, logits, gradients, merged weights, files both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import LuthierError, ModelError, RecipeError
from luthier.engine.state import trained_tensors
from luthier.methods.vera import VeRA
from luthier.models.peft_names import live
from luthier.models.shared_projection import SharedPair, scaled_projections, scaled_projections_plain
from luthier.models.sites import sites
from methods.rig import TOKENS, base, logits, stir, train

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
CASES = {
    "all linears": ("llama", {"target_modules": "all-linear"}),
    "biases in the base": ("qwen2", {"target_modules": ["q_proj", "down_proj"]}),
    "Conv1D": ("gpt2", {"target_modules": "all-linear"}),
    "another key and start": ("llama", {"target_modules": ["k_proj", "up_proj"], "projection_prng_key": 7,
                                        "d_initial": -0.3}),
    "the pair not saved": ("llama", {"target_modules": ["q_proj", "v_proj"], "save_projection": False}),
    "head saved whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "layers": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "regex": ("llama", {"target_modules": r".*\.(q|gate)_proj"}),
}  # fmt: skip
Case = tuple[str, dict[str, Any]]


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def theirs(case: Case) -> nn.Module:
    options = {"r": 24, **case[1]}
    model = peft.get_peft_model(base(case[0]), peft.VeraConfig(task_type="CAUSAL_LM", **options))
    stir(model)
    return model.eval()


def ours(case: Case) -> tuple[VeRA, nn.Module]:
    method, model = VeRA(r=24, **case[1]), base(case[0])
    method.attach(model)
    return method, model


def copied(case: Case) -> tuple[VeRA, nn.Module, nn.Module]:
    oracle, (method, model) = theirs(case), ours(case)
    method.load(model, peft.get_peft_model_state_dict(oracle))
    return method, model, oracle


def test_the_pair_is_drawn_as_theirs(case: Case) -> None:
    """Never loaded here: key, order, bounds and sizes give the same numbers."""
    oracle, (_, model) = theirs(case), ours(case)
    shared = next(module for module in model.modules() if isinstance(module, SharedPair))
    for name in ("vera_A", "vera_B"):
        assert torch.equal(getattr(shared, name), getattr(oracle.base_model, name)["default"])


def test_same_logits_and_gradients(case: Case) -> None:
    _, model, oracle = copied(case)
    mine, right = model(input_ids=TOKENS).logits, oracle(input_ids=TOKENS).logits
    torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
    mine.square().mean().backward()
    right.square().mean().backward()
    grads = {n.replace(".default", "").replace(".modules_to_save", ""): p.grad for n, p in oracle.named_parameters()}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for p in oracle.parameters() if p.requires_grad
    )
    for name, tensor in live(model).items():
        torch.testing.assert_close(tensor.grad, grads[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert tensor.grad.abs().max() > 0


def test_same_merged_weights(case: Case) -> None:
    method, model, oracle = copied(case)
    method.merge(model)
    merged = oracle.merge_and_unload().state_dict()
    assert list(model.state_dict()) == list(merged)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)


def test_our_file_in_peft(case: Case, tmp_path: Path) -> None:
    method, model = ours(case)
    stir(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    oracle = peft.PeftModel.from_pretrained(base(case[0]), tmp_path / "a").eval()
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
    oracle.save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / f"{n}/adapter_model.safetensors") for n in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ("base_model.vera_A" in first) == method.save_projection


def test_their_file_in_ours(case: Case, tmp_path: Path) -> None:
    oracle = theirs(case)
    oracle.save_pretrained(tmp_path / "a")
    model, notes = base(case[0]), []
    method = load_adapter(tmp_path / "a", model, notes=notes)
    assert not notes
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
    save_adapter(tmp_path / "b", method, model, base_path="tiny")
    first, second = (load_file(tmp_path / f"{n}/adapter_model.safetensors") for n in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_pair_in_the_file_wins_over_the_key() -> None:
    """A file made where torch draws otherwise: its own pair is what its vectors were trained with."""
    method, model = ours(CASES["all linears"])
    tensors = method.tensors(model)
    tensors["base_model.vera_A"] = tensors["base_model.vera_A"] + 1
    method.load(model, tensors)
    assert torch.equal(method.tensors(model)["base_model.vera_A"], tensors["base_model.vera_A"])
    del tensors["base_model.vera_B"]
    with pytest.raises(ModelError, match="vera_B"):
        method.load(model, tensors)


@pytest.mark.parametrize("saved", [True, False])
def test_one_pair_however_many_sites(saved: bool) -> None:
    """One storage: after a copy and a move too; once in a checkpoint, or not at all."""
    method = VeRA(r=8, save_projection=saved)
    model = base("llama")
    method.attach(model)
    for each in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.float64)):
        stores = {site.delta.shared.vera_A.data_ptr() for site in sites(each)}
        assert len(stores) == 1 and len(sites(each)) == 14
        kept = [name for name in trained_tensors(each) if "vera_A" in name]
        assert len(kept) == int(saved)
    assert not any(p.shape[0] == 8 and p.ndim == 2 for p in model.parameters() if p.requires_grad)


def test_resumes_from_the_key_alone() -> None:
    method = VeRA(r=8, save_projection=False)
    first, second = base("llama"), base("llama")
    method.attach(first)
    train(method, first)
    torch.manual_seed(99)  # not what the pair is drawn from
    method.attach(second)
    method.load(second, method.tensors(first))
    assert torch.equal(logits(first), logits(second))


def parts(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    made = [draw(2, 5, 7), draw(2, 5, 4), draw(7, 4), draw(4), draw(7)]
    return [tensor.requires_grad_(index != 2) for index, tensor in enumerate(made)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_backward_equals_its_plain_twin(dtype: torch.dtype) -> None:
    found = []
    for function in (scaled_projections, scaled_projections_plain):
        tensors = parts(dtype)
        out = function(*tensors)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape))
        found.append([out.detach(), *(t.grad for i, t in enumerate(tensors) if i != 2)])
    close = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-4}
    for mine, twin in zip(*found, strict=True):
        torch.testing.assert_close(mine, twin, **close)


def test_gradients_by_finite_differences() -> None:
    y, z, b_OR, d_R, b_O = parts(torch.float64)
    assert torch.autograd.gradcheck(lambda y, z, d, b: scaled_projections(y, z, b_OR, d, b), (y, z, d_R, b_O))


def test_only_what_is_asked_for_is_made() -> None:
    y, z, b_OR, d_R, b_O = (t.detach() for t in parts(torch.float32))
    scaled_projections(y, z, b_OR, d_R, b_O.requires_grad_()).sum().backward()
    assert b_O.grad is not None and d_R.grad is None and z.grad is None


def test_under_autocast_in_its_dtype() -> None:
    method, model = ours(CASES["all linears"])
    stir(model)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(input_ids=TOKENS).logits
    torch.testing.assert_close(narrow.float(), logits(model), atol=0.1, rtol=0.1)
    narrow.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert method.r == 24


def test_dropout_only_in_training() -> None:
    model = base("llama")
    VeRA(r=8, vera_dropout=0.5).attach(model)
    stir(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_the_weight_is_what_is_added() -> None:
    _, model = ours(CASES["biases in the base"])
    stir(model)
    delta = sites(model)[0].delta
    x = torch.randn(3, delta.inputs)
    added = delta(x, torch.zeros(3, delta.outputs), nn.Identity())
    torch.testing.assert_close(added, functional.linear(x, delta.weight()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "fields", [{"r": 0}, {"d_initial": 0.0}, {"projection_prng_key": -1}, {"vera_dropout": 1.0}], ids=str
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        VeRA(**fields)
    assert caught.value.where == f"method.{next(iter(fields))}"


def test_a_file_with_trained_biases_is_refused(tmp_path: Path) -> None:
    oracle = theirs(("qwen2", {"target_modules": ["q_proj"], "bias": "vera_only"}))
    oracle.save_pretrained(tmp_path / "a")
    with pytest.raises(LuthierError, match="bias"):
        load_adapter(tmp_path / "a", base("qwen2"))


def test_exclusion_is_written_as_names(tmp_path: Path) -> None:
    """PEFT's VeRA has no `exclude_modules`: the file names what is left."""
    method, model = VeRA(r=8, exclude_modules=["layers.0.mlp.up_proj", "k_proj"]), base("llama")
    method.attach(model)
    stir(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    for file in ("luthier.json", None):
        oracle = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "a").eval()
        torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
        again = base("llama")
        load_adapter(tmp_path / "a", again)
        assert torch.equal(logits(again), logits(model))
        if file:
            (tmp_path / "a" / file).unlink()


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_config_has_only_keys_that_peft_knows(tmp_path: Path) -> None:
    method, model = ours(CASES["all linears"])
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    assert peft.VeraConfig.from_pretrained(str(tmp_path / "a")).r == 24
