"""LoRA's starts on whole models: the base untouched, PEFT's conversion, files, resume, refusals."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from luthier.artifact.adapter import CONFIG, TENSORS, load_adapter, save_adapter
from luthier.contracts.errors import LuthierError, ModelError, RecipeError
from luthier.engine.state import load_trained, trained_tensors
from luthier.methods.dora import DoRA
from luthier.methods.lora import LoRA
from luthier.models.sites import AdaptedLinear, base_state, detach, named_sites, sites
from luthier.models.weights import nf4
from methods.rig import TOKENS, base, logits, loss, optimizer, stir, train

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
SOME = ("q_proj", "v_proj", "down_proj")
DIFFERENCES = ("pissa", "pissa_niter_4", "olora")
STARTS = (*DIFFERENCES, "orthogonal", "gaussian", "eva")


def attached(init: Any, family: str = "llama", kind: type[LoRA] = LoRA, **fields: Any) -> tuple[LoRA, nn.Module]:
    model = base(family)
    torch.manual_seed(0)
    method = kind(**{"r": 4, "lora_alpha": 6, "init_lora_weights": init, **fields})
    method.attach(model)
    return method, model


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_start_is_the_base_and_trains(init: str, family: str, kind: type[LoRA]) -> None:
    method, model = attached(init, family, kind)
    untouched = logits(base(family))
    torch.testing.assert_close(logits(model), untouched, atol=1e-5, rtol=1e-5)
    before = loss(model).item()
    train(method, model, 4)
    assert loss(model).item() < before
    state = base_state(model)
    assert all(torch.equal(state[name], value) for name, value in base(family).state_dict().items())
    with method.off(model):
        assert torch.equal(logits(model), untouched)


# ---------------------------------------------------------------- pissa, olora: the difference to a start


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 3}}], ids=str)
def test_the_file_is_pefts_conversion(init: str, options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT starts, is saved, trains, and converts; ours from the same start at the same point writes the same file."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=list(SOME), init_lora_weights=init, **options
    )
    oracle = peft.get_peft_model(base("llama"), config)
    oracle.peft_config["default"].init_lora_weights = True  # PEFT wants the start saved as a plain adapter
    oracle.save_pretrained(tmp_path / "start")
    stir(oracle, 0.02)
    tuned = peft.get_peft_model_state_dict(oracle)
    oracle.peft_config["default"].init_lora_weights = init
    oracle.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))

    method, model = attached(init, target_modules=SOME, **options)
    with torch.no_grad():
        for path, site in named_sites(model):
            for letter in "AB":
                value = tuned[f"base_model.model.{path}.lora_{letter}.weight"]
                getattr(site.delta, f"lora_{letter}").copy_(value)
    torch.testing.assert_close(logits(model), logits(oracle.eval()), atol=1e-5, rtol=1e-4)
    save_adapter(tmp_path / "ours", method, model, base_path="tiny")
    mine, right = (load_file(tmp_path / side / TENSORS) for side in ("ours", "theirs"))
    assert mine.keys() == right.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, right[name], atol=1e-5, rtol=1e-4)
    mine, right = (json.loads((tmp_path / side / CONFIG).read_text("utf-8")) for side in ("ours", "theirs"))
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora"):
        assert mine[key] == pytest.approx(right[key]), key
    assert mine["init_lora_weights"] is True


def test_the_gradients_are_pefts() -> None:
    """On the residual of PEFT's base the same pair has the same gradients."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=list(SOME))
    config.init_lora_weights = "pissa"
    oracle = peft.get_peft_model(base("llama"), config)
    _, model = attached("pissa", target_modules=SOME)
    for one in (model, oracle):
        one(input_ids=TOKENS).logits.square().mean().backward()
    grads = {name.replace(".default", ""): p.grad for name, p in oracle.named_parameters() if p.requires_grad}
    for path, site in named_sites(model):
        for letter in "AB":
            mine = getattr(site.delta, f"lora_{letter}").grad
            right = grads[f"base_model.model.{path}.lora_{letter}.weight"]
            torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("init", DIFFERENCES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_file_is_a_plain_adapter_of_twice_the_rank(
    init: str, family: str, kind: type[LoRA], tmp_path: Path
) -> None:
    method, model = attached(init, family, kind)
    train(method, model)
    tuned = logits(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    again = base(family)
    loaded = load_adapter(tmp_path / "a", again)
    assert type(loaded) is kind
    assert (loaded.r, loaded.init_lora_weights) == (8, True)
    assert torch.equal(logits(again), tuned)
    oracle = peft.PeftModel.from_pretrained(base(family), tmp_path / "a")
    torch.testing.assert_close(logits(oracle), tuned, atol=1e-5, rtol=1e-4)
    method.merge(model)
    torch.testing.assert_close(logits(model), tuned, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("init", [*DIFFERENCES, "orthogonal"])
def test_a_resumed_run_is_the_same_run(init: str) -> None:
    """The start is drawn anew at the resume, and then comes from the checkpoint."""
    method, model = attached(init)
    first = optimizer(method, model)
    train(method, model, 2, optim=first)
    kept, state = copy.deepcopy(trained_tensors(model)), copy.deepcopy(first.state_dict())
    assert any(name.endswith("start_A") for name in kept) == (init in DIFFERENCES)
    train(method, model, 2, first=2, optim=first)
    torch.manual_seed(99)
    twin = base("llama")
    method.attach(twin)
    load_trained(twin, kept)
    second = optimizer(method, twin)
    second.load_state_dict(state)
    train(method, twin, 2, first=2, optim=second)
    assert torch.equal(logits(twin), logits(model))


def test_load_takes_the_halves_apart() -> None:
    method, model = attached("pissa_niter_4")
    train(method, model)
    torch.manual_seed(7)
    twin = base("llama")
    method.attach(twin)
    method.load(twin, method.tensors(model))
    assert torch.equal(logits(twin), logits(model))
    mine, right = trained_tensors(twin), trained_tensors(model)
    assert all(torch.equal(mine[name], right[name]) for name in right)
    with pytest.raises(ModelError, match="another shape"):
        method.load(twin, {name: tensor[:4, :4] for name, tensor in method.tensors(model).items()})


def test_sites_with_a_start_share_their_inputs() -> None:
    grads = []
    for together in (True, False):
        _, model = attached("pissa")
        for site in sites(model):
            site.shared = site.shared if together else None
        stir(model, 0.02)
        loss(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, mine in grads[0].items():
        torch.testing.assert_close(mine, grads[1][name], atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- loftq: the NF4 form of the base


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loftq_belongs_to_the_nf4_form_of_the_base(family: str, tmp_path: Path) -> None:
    method, model = attached("loftq", family, r=16)
    original = base(family).state_dict()
    for path, site in named_sites(model):
        assert torch.equal(site.base_layer.weight, nf4.rounded(original[f"{path}.weight"]))
    plain = base(family)
    for path in [path for path, _ in named_sites(model)]:
        module = plain.get_submodule(path)
        module.weight.data = nf4.rounded(module.weight.data)
    right, rounded, started = logits(base(family)), logits(plain), logits(model)
    assert (started - right).norm() < 0.8 * (rounded - right).norm()

    train(method, model)
    tuned = logits(model)
    with method.off(model):  # the base as it was loaded
        assert torch.equal(logits(model), right)
    assert all(torch.equal(base_state(model)[name], value) for name, value in original.items())
    assert not any(name.endswith("base_layer.weight") for name in method.tensors(model))
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    again = base(family)
    assert load_adapter(tmp_path / "a", again).init_lora_weights == "loftq"
    assert torch.equal(logits(again), tuned)
    detach(again)
    assert torch.equal(logits(again), right)
    method.merge(model)
    torch.testing.assert_close(logits(model), tuned, atol=1e-5, rtol=1e-4)
    assert list(model.state_dict()) == list(original)


def test_a_loftq_file_without_our_words_is_refused(tmp_path: Path) -> None:
    """Its base could be any: the iterations and bits are not in what is read."""
    method, model = attached("loftq")
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    for change in ({"loftq_config": {}}, {"loftq_config": {"loftq_bits": 4, "loftq_iter": 5}}):
        path = tmp_path / "a" / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}), encoding="utf-8")
        with pytest.raises(LuthierError, match="loftq"):
            load_adapter(tmp_path / "a", base("llama"))


def test_loftq_resumes_from_the_same_form() -> None:
    method, model = attached("loftq")
    train(method, model, 2)
    twin = base("llama")
    method.attach(twin)
    load_trained(twin, trained_tensors(model))
    assert torch.equal(logits(twin), logits(model))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("init", ["corda", "lora_ga", "mica", "magic", "pissa_niter_", "pissa_niter_0", 3])
def test_other_starts_are_refused_by_name(init: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        LoRA(init_lora_weights=init)
    assert (caught.value.where, caught.value.value) == ("method.init_lora_weights", init)
    assert caught.value.remedy


@pytest.mark.parametrize("init", [*DIFFERENCES, "loftq", "orthogonal"])
def test_what_a_start_cannot(init: str) -> None:
    for fields, says in (
        ({"r": 40}, r"k_proj.*64 by 32"),
        ({"target_modules": ("q_proj", "embed_tokens")}, "embed_tokens is an embedding"),
    ):
        model = base("llama")
        with pytest.raises(RecipeError, match=says) as caught:
            LoRA(init_lora_weights=init, **fields).attach(model)
        assert caught.value.remedy
        assert not sites(model)
    packed = base("llama-nf4")
    if init == "orthogonal":  # it looks at no weight
        LoRA(init_lora_weights=init, r=4).attach(packed)
        return
    with pytest.raises(RecipeError, match="before it was rounded") as caught:
        LoRA(init_lora_weights=init, r=4).attach(packed)
    assert "model.quantization: none" in str(caught.value.remedy)


def test_orthogonal_wants_an_even_rank() -> None:
    with pytest.raises(RecipeError, match="even rank"):
        attached("orthogonal", r=3)


def test_a_rank_above_the_matrix_is_found_before_training() -> None:
    model = base("llama")
    for fields in ({"r": 40}, {"r": 4, "rank_pattern": {"k_proj": 33}}):
        with pytest.raises(RecipeError, match=r"k_proj.*64 by 32") as caught:
            LoRA(**fields).check(model)
        assert "rank_pattern: {k_proj: 32}" in caught.value.remedy
    LoRA(r=32).check(model)
    LoRA(r=40, rank_pattern={"[kv]_proj": 32}).check(model)


@pytest.mark.parametrize("init", [*DIFFERENCES, "loftq", "orthogonal", "eva"])
def test_shapes_alone_are_enough_for_counts(init: str) -> None:
    real = attached(init)
    with torch.device("meta"):
        model = type(base("llama"))(base("llama").config)
    replace(real[0]).attach(model)
    shapes: Callable[[nn.Module], dict] = lambda m: {n: p.shape for n, p in m.named_parameters() if p.requires_grad}
    assert shapes(model) == shapes(real[1])


def test_dropout_leaves_a_start_the_base() -> None:
    """What is dropped is the change's input: no change, nothing dropped."""
    _, model = attached("pissa", lora_dropout=0.5)
    model.train()
    torch.testing.assert_close(logits(model), logits(base("llama")), atol=1e-5, rtol=1e-5)


def test_a_start_in_bf16_is_close_to_the_base() -> None:
    model = base("llama").to(torch.bfloat16)
    LoRA(r=4, init_lora_weights="pissa").attach(model)
    untouched = logits(base("llama").to(torch.bfloat16))
    torch.testing.assert_close(logits(model), untouched, atol=2e-2, rtol=2e-2)
    assert all(site.delta.lora_A.dtype == torch.float32 for site in sites(model) if isinstance(site, AdaptedLinear))
