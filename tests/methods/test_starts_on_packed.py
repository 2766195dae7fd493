"""Starts that read the weight on a base that is packed while it is read: they come first, and are found again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import luthier
from luthier import run
from luthier.artifact.adapter import SIDE, load_adapter, read_adapter, save_adapter
from luthier.contracts.errors import ModelError, RecipeError
from luthier.contracts.event import Saved
from luthier.engine.state import load_trained, trained_tensors
from luthier.methods.dora import DoRA
from luthier.methods.lora import LoRA
from luthier.methods.lora_xs import LoRAXS
from luthier.models import low_rank_starts
from luthier.models.load import load_model, save_whole
from luthier.models.quantise import FORMATS, densify, format_of, lifts_digest, packed_linears, quantise
from luthier.models.sites import detach, named_sites
from luthier.models.weights import nf4
from luthier.opened import open_target
from luthier.recipe.recipe import ModelSection
from methods.rig import TOKENS, logits, optimizer, stir, train
from tiny import tiny, tiny_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden/bitsandbytes"
STARTS = ("pissa", "pissa_niter_4", "olora", "loftq", "loftq_niter_3")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer, model = tiny_tokenizer(), tiny("llama", **SIZES)
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):  # a spectrum that falls, as trained weights have
            o, d = parameter.shape
            left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (o, d))
            size = min(o, d)
            parameter.data = (left[:, :size] * 2.0 ** (-torch.arange(size) / 5)) @ right[:size] + 0.02 * torch.randn(
                o, d, generator=generator
            )
    return save_whole(model, tokenizer, tokenizer.chat_template, tmp_path_factory.mktemp("base") / "llama")


def dense(directory: Path) -> nn.Module:
    return load_model(ModelSection(path=str(directory)), dtype=torch.float32).model


def made(directory: Path, method: Any, name: str = "nf4", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base, packed after the method's start."""
    section = ModelSection(path=str(directory), quantization=name)
    return load_model(section, dtype=dtype, before_packing=method.before_packing).model


def lora(init: str, kind: type[LoRA] = LoRA, **fields: Any) -> LoRA:
    return kind(**{"r": 8, "lora_alpha": 12, "init_lora_weights": init, **fields})


@torch.no_grad()
def distance(model: nn.Module, original: nn.Module) -> float:
    """Frobenius distance of all packed matrices to what they were."""
    squares = 0.0
    for path, module in packed_linears(model).items():
        squares += float(
            (module.matrix() - original.get_submodule(path.replace(".base_layer", "")).weight).square().sum()
        )
    return squares**0.5


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("init", STARTS)
def test_what_is_packed_and_what_the_base_is(init: str, name: str, directory: Path) -> None:
    method = lora(init)
    model, original = made(directory, method, name), dense(directory)
    for path, module in packed_linears(model).items():
        weight: Tensor = original.get_submodule(path).weight
        left, scale = weight, 1.5
        assert (module.start, module.lift_scale) == (init, scale)
        if init in ("pissa", "pissa_niter_4", "olora"):
            left = weight - scale * (module.lift_B @ module.lift_A)
        elif init == "loftq_niter_3":
            rounded = lambda matrix: FORMATS[name].pack(matrix, None).matrix()
            _, left = low_rank_starts.loftq_rounds(weight, rounded, 8, scale, 3)
        expected = FORMATS[name].pack(left, None)
        assert torch.equal(module.weight, expected.weight)
        lifted = torch.addmm(expected.matrix(), module.lift_B, module.lift_A, alpha=scale)
        assert torch.equal(module.matrix(), lifted)
    untouched = logits(model)
    torch.manual_seed(0)
    method.attach(model)
    torch.testing.assert_close(logits(model), untouched, atol=1e-5, rtol=1e-5)  # the start is the base
    train(method, model, 4)
    assert not torch.equal(logits(model), untouched)
    with method.off(model):
        assert torch.equal(logits(model), untouched)
    detach(model)
    assert torch.equal(logits(model), untouched)


@pytest.mark.parametrize("init", ["pissa", "loftq", "loftq_niter_3"])
def test_the_base_is_nearer_to_the_original_than_plain_rounding(init: str, directory: Path) -> None:
    """QPiSSA's and LoftQ's promise, measured: the error of W falls against plain QLoRA, and with the rounds."""
    original = dense(directory)
    plain = distance(quantise(dense(directory), "nf4"), original)
    found = distance(made(directory, lora(init)), original)
    assert found < 0.9 * plain
    if init == "loftq_niter_3":
        assert found < distance(made(directory, lora("loftq")), original)


@pytest.mark.parametrize("rounds", [1, 5])
def test_loftq_is_pefts(rounds: int) -> None:
    """On bitsandbytes' own codes, frozen: the same matrix is left and the pair is the same."""
    golden = load_file(GOLDEN / "loftq.safetensors")
    (a, b), left = low_rank_starts.loftq_rounds(golden["weight"], nf4.rounded, 6, 1.0, rounds)
    torch.testing.assert_close(nf4.rounded(left), golden[f"{rounds}.left"], atol=1e-6, rtol=0)
    torch.testing.assert_close(b @ a, golden[f"{rounds}.b"] @ golden[f"{rounds}.a"], atol=1e-5, rtol=1e-3)
    (a_scaled, b_scaled), again = low_rank_starts.loftq_rounds(golden["weight"], nf4.rounded, 6, 2.0, rounds)
    torch.testing.assert_close(2.0 * b_scaled @ a_scaled, b @ a, atol=1e-5, rtol=1e-3)  # the scale is divided out
    torch.testing.assert_close(again, left, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("init", STARTS)
def test_a_saved_adapter_finds_its_base_again(init: str, kind: type[LoRA], directory: Path, tmp_path: Path) -> None:
    method = lora(init, kind)
    model = made(directory, method)
    method.attach(model)
    train(method, model)
    stir(model, 0.02)
    saved = save_adapter(tmp_path / "a", method, model, base_path=str(directory))
    tiny_tokenizer().save_pretrained(saved)
    file = read_adapter(saved)
    assert (file.base_start, file.base_storage["quantization"]) == (init, "nf4")
    assert (file.config["r"], file.config["init_lora_weights"]) == (16, True)
    again = open_target(saved)
    assert torch.equal(logits(again.model), logits(model))
    with again.method.off(again.model), method.off(model):
        assert torch.equal(logits(again.model), logits(model))


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_on_the_dense_base_the_file_is_the_change_since_the_start(init: str, directory: Path, tmp_path: Path) -> None:
    """A plain LoRA of twice the rank, as PEFT reads it; and nearer to the trained model than that change left out."""
    peft = pytest.importorskip("peft")
    method = lora(init)
    model = made(directory, method)
    method.attach(model)
    stir(model, 0.05)
    saved = save_adapter(tmp_path / "a", method, model, base_path=str(directory))
    plain = dense(directory)
    untouched = logits(plain)
    load_adapter(saved, plain)
    oracle = peft.PeftModel.from_pretrained(dense(directory), saved)
    torch.testing.assert_close(logits(oracle), logits(plain), atol=1e-5, rtol=1e-4)
    for path, site in named_sites(plain):
        change = model.get_submodule(path).delta.weight()
        torch.testing.assert_close(site.delta.weight(), change, atol=1e-5, rtol=1e-4)
    assert (logits(plain) - logits(model)).norm() < 0.5 * (untouched - logits(model)).norm()


@pytest.mark.parametrize("init", ["pissa", "loftq_niter_3"])
def test_another_packed_base_is_refused(init: str, directory: Path, tmp_path: Path) -> None:
    method = lora(init)
    model = made(directory, method)
    method.attach(model)
    stir(model, 0.05)
    saved = save_adapter(tmp_path / "a", method, model, base_path=str(directory))
    others = [quantise(dense(directory), "nf4"), made(directory, lora("olora"))]
    plain = LoRA(r=2)
    plain.attach(others[0])
    saved_plain = save_adapter(tmp_path / "b", plain, others[0], base_path=str(directory))
    detach(others[0])
    for other, adapter in ((others[0], saved), (others[1], saved), (others[1], saved_plain)):
        with pytest.raises(ModelError, match="packed after its start") as caught:
            load_adapter(adapter, other)
        assert "\n" not in caught.value.line()
    load_adapter(saved_plain, others[0])


@pytest.mark.parametrize("init", STARTS)
def test_a_resumed_run_is_the_same_run(init: str, directory: Path) -> None:
    method = lora(init)
    model = made(directory, method)
    method.attach(model)
    first = optimizer(method, model)
    train(method, model, 2, optim=first)
    kept, state = copy.deepcopy(trained_tensors(model)), copy.deepcopy(first.state_dict())
    train(method, model, 2, first=2, optim=first)
    torch.manual_seed(99)
    twin = made(directory, method)
    method.attach(twin)
    assert lifts_digest(twin) == lifts_digest(model)
    load_trained(twin, kept)
    second = optimizer(method, twin)
    second.load_state_dict(state)
    train(method, twin, 2, first=2, optim=second)
    assert torch.equal(logits(twin), logits(model))


def test_an_interrupted_training_goes_on(directory: Path, tmp_path: Path) -> None:
    """Through the whole program: stopped after two of four steps, and resumed, it writes the same adapter."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"What is {i}?", "completion": f"{i + 1}"}) + "\n" for i in range(24))
    )
    written = []
    for name, stop in (("whole", 0), ("halves", 2)):
        recipe = luthier.Recipe(
            model={"path": str(directory), "quantization": "nf4"}, data=str(rows), output_dir=str(tmp_path / name),
            method={"name": "lora", "r": 4, "init_lora_weights": "pissa_niter_4"},
            train={"max_steps": 4, "tokens_per_step": 64, "save_every": 1}, engine={"device": "cpu"},
        )  # fmt: skip
        if stop:
            events = iter(luthier.train(recipe))
            for event in events:
                if isinstance(event, Saved) and event.step == stop:
                    break
            events.close()
        done = luthier.train(recipe, resume="auto" if stop else None)
        done.wait()
        written.append(load_file(done.result / "adapter_model.safetensors"))
        assert read_adapter(done.result).base_start == "pissa_niter_4"
    assert all(torch.equal(written[0][key], tensor) for key, tensor in written[1].items())


@pytest.mark.parametrize("into", ["dense", "quantised"])
def test_both_merges_are_measured(into: str, directory: Path, tmp_path: Path) -> None:
    method = lora("pissa")
    model = made(directory, method)
    method.attach(model)
    stir(model, 0.05)
    saved = save_adapter(tmp_path / "a", method, model, base_path=str(directory))
    tiny_tokenizer().save_pretrained(saved)
    report = run.merge(saved, tmp_path / "out", into=into)
    merged = load_model(ModelSection(path=str(tmp_path / "out")), dtype=torch.float32).model
    assert format_of(merged) == ("none" if into == "dense" else "nf4")
    assert report["difference_into_dense"] > 0
    assert report["difference_into_quantised"] > 0
    away = (logits(merged) - logits(model)).norm()
    assert away < 0.5 * (logits(dense(directory)) - logits(model)).norm()


def test_casts_copies_and_other_dtypes_keep_the_start(directory: Path) -> None:
    model = made(directory, lora("pissa"))
    path, module = next(iter(packed_linears(model).items()))
    exact = module.matrix()
    twin = copy.deepcopy(model).to(torch.bfloat16)
    there: Any = twin.get_submodule(path)
    assert there.lift_A.dtype == torch.float32
    assert torch.equal(there.matrix(), exact)
    torch.testing.assert_close(there.matrix(torch.bfloat16).float(), exact, atol=1e-3, rtol=2**-7)
    x = torch.randn(3, module.in_features, requires_grad=True)
    expected = nn.functional.linear(x, exact)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    slopes = torch.randn_like(expected)
    mine, theirs = torch.autograd.grad(module(x), x, slopes), torch.autograd.grad(expected, x, slopes)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    before = logits(model)
    torch.testing.assert_close(logits(densify(model)), before, atol=1e-5, rtol=1e-5)
    assert lifts_digest(model) is None


def test_an_adapter_in_bf16_keeps_the_pair_that_it_saves(directory: Path, tmp_path: Path) -> None:
    method = lora("pissa", adapter_dtype="bf16")
    model = made(directory, method)
    untouched = logits(model)
    method.attach(model)
    torch.testing.assert_close(logits(model), untouched, atol=2e-2, rtol=2e-2)
    stir(model, 0.05)
    saved = save_adapter(tmp_path / "a", method, model, base_path=str(directory))
    tiny_tokenizer().save_pretrained(saved)
    again = open_target(saved).model
    mine, theirs = packed_linears(model), packed_linears(again)
    assert all(torch.equal(theirs[path].weight, module.weight) for path, module in mine.items())


def test_lora_xs_takes_its_factors_before(directory: Path, tmp_path: Path) -> None:
    method = LoRAXS(r=4)
    model, expected = made(directory, method), quantise(dense(directory), "nf4")
    assert torch.equal(logits(model), logits(expected))  # the base is the plain one
    method.attach(model)
    original = dense(directory)
    whole = LoRAXS(r=4)
    whole.attach(original)
    for path, site in named_sites(model):
        theirs: Any = original.get_submodule(path)
        assert torch.equal(site.delta.lora_xs_A, theirs.delta.lora_xs_A)
    train(method, model)
    saved = save_adapter(tmp_path / "a", method, model, base_path=str(directory))
    tiny_tokenizer().save_pretrained(saved)
    assert torch.equal(logits(open_target(saved).model), logits(model))
    with pytest.raises(RecipeError, match="before it was rounded"):
        LoRAXS(r=4).attach(quantise(dense(directory), "nf4"))


def test_only_targets_have_a_start_and_shapes_are_checked_first(directory: Path) -> None:
    method = lora("olora", target_modules=("q_proj", "down_proj"), rank_pattern={"down_proj": 3})
    model = made(directory, method)
    lifted = {path.rpartition(".")[2]: module for path, module in packed_linears(model).items() if module.start}
    assert sorted(lifted) == ["down_proj", "q_proj"]
    assert len(lifted["down_proj"].lift_A) == 3
    method.attach(model)
    assert torch.isfinite(logits(model, TOKENS)).all()
    with pytest.raises(RecipeError, match="rank is larger"):
        made(directory, lora("pissa", r=60))


@pytest.mark.parametrize("init", ["loftq_niter_3", "loftq_niter_0", "loftq_niter_"])
def test_more_rounds_of_loftq_are_for_packed_bases(init: str, directory: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        lora(init).attach(dense(directory))
    assert caught.value.remedy


def test_a_side_file_without_the_start_is_refused_where_it_matters(directory: Path, tmp_path: Path) -> None:
    """The start is named in our side file; without it the adapter is the change since the start, on any base."""
    method = lora("pissa")
    model = made(directory, method)
    method.attach(model)
    stir(model, 0.05)
    saved = save_adapter(tmp_path / "a", method, model, base_path=str(directory))
    side = json.loads((saved / SIDE).read_text("utf-8"))
    assert side["base"].pop("start") == "pissa"
    (saved / SIDE).write_text(json.dumps(side), "utf-8")
    with pytest.raises(ModelError, match="packed after its start"):
        load_adapter(saved, made(directory, method))
    load_adapter(saved, dense(directory))
