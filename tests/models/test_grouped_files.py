"""GPTQ and AWQ checkpoints as frozen bases, against what AutoGPTQ and AutoAWQ wrote and computed (tests/golden)."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import ModelError
from luthier.methods.lora import LoRA
from luthier.models.adapted_linears import Adapted, adapted_linears, adapted_linears_plain
from luthier.models.load import load_model, save_whole
from luthier.models.quantise import dense, densify, format_of, quantisable
from luthier.models.sites import replace
from luthier.models.weights import awq, gptq, numbers_of, read
from luthier.models.weights.grouped import Grid, GroupedLinear, dequantise, dequantise_plain, nearest, pack, unpack
from luthier.planned import stored_of
from luthier.recipe.recipe import ModelSection, Recipe
from methods.rig import stir, train
from tiny import tiny, tiny_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden/grouped"
TOKENS = torch.arange(12)[None]
KINDS = ("gptq", "awq")
VARIANTS = [f"{bits}.{rest}" for bits in (2, 3, 4, 8) for rest in ("32.plain", "32.order", "-1.plain")]


def gptq_grid(variant: str) -> tuple[Grid, dict[str, Tensor], Tensor]:
    """(as read here, the words of the file, the matrix (in, out) that AutoGPTQ computes with)."""
    found = {k.removeprefix(f"{variant}."): t for k, t in load_file(GOLDEN / "gptq.safetensors").items()
             if k.startswith(f"{variant}.")}  # fmt: skip
    bits, group, _ = variant.split(".")
    theirs = found.pop("matrix")
    return gptq.read(found, int(bits), int(group), 1), found, theirs


def awq_grid(group: str) -> tuple[Grid, dict[str, Tensor], Tensor]:
    found = {k.removeprefix(f"{group}."): t for k, t in load_file(GOLDEN / "awq.safetensors").items()
             if k.startswith(f"{group}.")}  # fmt: skip
    theirs = found.pop("matrix")
    return awq.read(found, int(group)), found, theirs


def numbers(grid: Grid, dtype: torch.dtype) -> Tensor:
    out = torch.empty(grid.shape, dtype=dtype)
    dequantise(grid, out)
    return out


def with_tokenizer(kind: str, tmp_path: Path, **said: Any) -> Path:
    """The small model of that kind; `said` changes its quantization_config, None takes a key out."""
    target = Path(shutil.copytree(GOLDEN / kind, tmp_path / "model"))
    tiny_tokenizer().save_pretrained(target)
    config = json.loads((target / "config.json").read_text("utf-8"))
    config["quantization_config"] = {
        key: value for key, value in {**config["quantization_config"], **said}.items() if value is not None
    }
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return target


def load(path: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    return load_model(ModelSection(path=str(path), **fields), dtype=dtype).model


@pytest.mark.parametrize("variant", VARIANTS)
def test_gptq_words_are_read_and_written_to_the_bit(variant: str) -> None:
    grid, words, theirs = gptq_grid(variant)
    assert torch.equal(numbers(grid, torch.float16), theirs.T)
    assert (grid.places is None) == (not variant.endswith("order"))
    again = gptq.write(grid, 1)
    assert again.keys() == words.keys()
    assert all(torch.equal(again[name], words[name]) for name in words)


@pytest.mark.parametrize("group", ["32", "-1"])
def test_awq_words_are_read_and_written_to_the_bit(group: str) -> None:
    grid, words, theirs = awq_grid(group)
    assert torch.equal(numbers(grid, torch.float16), theirs.T)
    again = awq.write(grid)
    assert again.keys() == words.keys()
    assert all(torch.equal(again[name], words[name]) for name in words)


def test_the_second_version_stores_zeros_as_they_are() -> None:
    grid, words, _ = gptq_grid("4.32.plain")
    second = {**words, "qzeros": pack(unpack(words["qzeros"].view(torch.uint8), 4) + 1, 4).view(torch.int32)}
    assert torch.equal(numbers(gptq.read(second, 4, 32, 0), torch.float32), numbers(grid, torch.float32))
    assert not torch.equal(numbers(gptq.read(second, 4, 32, 1), torch.float32), numbers(grid, torch.float32))


def test_a_zero_of_all_ones_is_one_more_than_the_codes_have() -> None:
    """The first version's 15 is 16: as the kernels of AutoGPTQ and exllama read it."""
    grid, words, _ = gptq_grid("4.32.plain")
    found = gptq.read({**words, "qzeros": torch.full_like(words["qzeros"], -1)}, 4, 32, 1)
    assert set(found.zero.flatten().tolist()) == {16}
    assert torch.equal(gptq.write(found, 1)["qzeros"], torch.full_like(words["qzeros"], -1))
    assert grid.zero.max() < 16


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_packing_comes_back_and_unpacking_is_the_plain_one(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from((2, 3, 4, 8)))
    rows, units, group = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    inputs = 8 * units
    values = torch.randint(0, 2**bits, (rows, inputs), dtype=torch.uint8, generator=generator)
    codes = pack(values, bits)
    assert codes.shape == (rows, inputs * bits // 8)
    assert torch.equal(unpack(codes, bits), values)
    groups = -(-inputs // group)
    places = torch.randint(0, groups, (inputs,), generator=generator) if data.draw(st.booleans()) else None
    scale = torch.rand(rows, groups, generator=generator).half()
    zero = torch.randint(0, 2**bits, (rows, groups), dtype=torch.int16, generator=generator)
    grid = Grid(codes, scale, zero, bits, group, places)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(numbers(grid, dtype), dequantise_plain(grid, dtype))
    same = nearest(dequantise_plain(grid), grid)
    assert torch.equal(dequantise_plain(same), dequantise_plain(grid))


def test_words_of_awq_wider_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, words, theirs = awq_grid("32")
    monkeypatch.setattr(awq, "_PIECE_NUMBERS", 600)
    assert torch.equal(numbers(awq.read(words, 32), torch.float16), theirs.T)
    assert torch.equal(awq.write(grid)["qweight"], words["qweight"])


def modules(variant: str = "4.32.order") -> list[GroupedLinear]:
    bias = nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(1)), requires_grad=False)
    return [gptq.GPTQLinear(gptq_grid(variant)[0], bias, {}), awq.AWQLinear(awq_grid("32")[0], None, {})]


@pytest.mark.parametrize("which", [0, 1], ids=KINDS)
def test_forward_and_backward_are_those_of_the_dense_linear(which: int) -> None:
    module = modules()[which]
    twin = dense(module, torch.float32)
    x = torch.randn(2, 5, 64, requires_grad=True)
    y, expected = module(x), twin(x)
    assert torch.equal(y, expected)
    slopes = torch.randn_like(y)
    mine, theirs = torch.autograd.grad(y, x, slopes), torch.autograd.grad(expected, x, slopes)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    pair = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    group = [Adapted(module, module.bias, *pair, 0.5)]
    torch.testing.assert_close(
        adapted_linears(x, group, torch.float32), adapted_linears_plain(x, group, torch.float32), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("which", [0, 1], ids=KINDS)
def test_casts_reach_only_the_bias(which: int) -> None:
    module = modules()[which]
    before = {key: value.clone() for key, value in module.state_dict().items() if key != "bias"}
    for cast in (torch.bfloat16, torch.float64, torch.float16, torch.bfloat16):
        module.to(cast)
    after = module.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert torch.equal(module.matrix(torch.bfloat16), module.matrix().bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_as_it_is_and_is_saved_as_it_was(kind: str, tmp_path: Path) -> None:
    directory = with_tokenizer(kind, tmp_path)
    loaded = load_model(ModelSection(path=str(directory)), dtype=torch.float32)
    assert (format_of(loaded.model), loaded.unexpected) == (kind, ())
    count = sum(isinstance(module, GroupedLinear) for module in loaded.model.modules())
    assert count == 7
    expected = densify(load(directory))
    assert torch.equal(loaded.model(TOKENS).logits, expected(TOKENS).logits)
    assert numbers_of(loaded.model) == sum(p.numel() for p in expected.parameters())
    half = load(directory, torch.bfloat16)(TOKENS).logits
    torch.testing.assert_close(half.float(), expected(TOKENS).logits, atol=0.05, rtol=0.1)
    tokenizer = tiny_tokenizer()
    again = save_whole(load(directory, torch.float16), tokenizer, tokenizer.chat_template, tmp_path / "again")
    mine, theirs = load_file(again / "model.safetensors"), load_file(directory / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    said = [json.loads((at / "config.json").read_text("utf-8"))["quantization_config"] for at in (directory, again)]
    assert said[0] == said[1]
    with pytest.raises(ModelError, match=f"in {kind} already"):
        load(directory, quantization="nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_what_the_files_hold(kind: str, tmp_path: Path) -> None:
    """The bytes of the linears; the table of an act-order, four bytes an input, is left out of a plan."""
    directory = with_tokenizer(kind, tmp_path)
    linears = [module for module in load(directory).modules() if isinstance(module, GroupedLinear)]
    words = json.loads((directory / "config.json").read_text("utf-8"))
    stored = stored_of(Recipe(model=str(directory), data="rows.jsonl", method="lora"), words)
    elements = sum(module.in_features * module.out_features for module in linears)
    tables = sum(4 * len(module.places) for module in linears if module.places is not None)
    assert stored.name == kind
    assert stored.linears(elements, 0) == sum(module.packed_bytes() for module in linears) - tables
    for said, name in (({"load_in_4bit": True}, "nf4"), ({"load_in_8bit": True}, "int8")):
        config = {**words, "quantization_config": {"quant_method": "bitsandbytes", **said}}
        assert stored_of(Recipe(model=str(directory), data="rows.jsonl", method="lora"), config).name == name


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_on_it_and_comes_back(kind: str, tmp_path: Path) -> None:
    model, method = load(with_tokenizer(kind, tmp_path)), LoRA(r=4)
    method.attach(model)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    train(method, model)
    stir(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    saved = save_adapter(tmp_path / "adapter", method, model, base_path=str(tmp_path / "model"))
    again = load(tmp_path / "model")
    load_adapter(saved, again)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_files_of_the_second_version(tmp_path: Path) -> None:
    directory = with_tokenizer("gptq", tmp_path)
    expected = load(directory)(TOKENS).logits
    files = load_file(directory / "model.safetensors")
    for name, words in files.items():
        if name.endswith("qzeros"):
            files[name] = pack(unpack(words.view(torch.uint8), 4) + 1, 4).view(torch.int32)
    save_file(files, directory / "model.safetensors", metadata={"format": "pt"})
    for key in ("checkpoint_format", "format"):  # the key's older and newer name
        config = json.loads((directory / "config.json").read_text("utf-8"))
        for name in ("checkpoint_format", "format"):
            config["quantization_config"].pop(name, None)
        config["quantization_config"][key] = "gptq_v2"
        (directory / "config.json").write_text(json.dumps(config), "utf-8")
        model = load(directory)
        assert torch.equal(model(TOKENS).logits, expected)
    tokenizer = tiny_tokenizer()
    again = save_whole(model, tokenizer, tokenizer.chat_template, tmp_path / "again")
    assert torch.equal(load(again)(TOKENS).logits, expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_conv1d_is_turned_in_files_too(bits: int, tmp_path: Path) -> None:
    """gpt2 keeps its weights the other way round; in GPTQ's files they lie as everybody's."""
    model, tokenizer = tiny("gpt2"), tiny_tokenizer()
    expected, said = copy.deepcopy(model), {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": False}
    for path, linear in quantisable(model).items():
        weight = read(linear)
        outputs, inputs = weight.shape
        scale = weight.reshape(outputs, -1, 16).abs().amax(2).half() / 2 ** (bits - 1)
        zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.int16)
        empty = Grid(torch.zeros(outputs, inputs * bits // 8, dtype=torch.uint8), scale, zero, bits, 16)
        module = gptq.GPTQLinear(nearest(weight, empty), linear.bias, said)
        module.turned = True
        assert (module.matrix() - weight).abs().max() <= 1.2 * scale.float().max()
        replace(model, path, module)
        replace(expected, path, dense(module, torch.float32))
    directory = save_whole(model, tokenizer, tokenizer.chat_template, tmp_path / "packed")
    found = load(directory)
    torch.testing.assert_close(found(TOKENS).logits, expected(TOKENS).logits, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(
        densify(found).state_dict().values(), expected.state_dict().values(), strict=True))  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [("gptq", "quantize_config.json"), ("awq", "quant_config.json")])
def test_older_files_say_it_beside_the_configuration(kind: str, name: str, tmp_path: Path) -> None:
    directory = with_tokenizer(kind, tmp_path)
    expected = load(directory)(TOKENS).logits
    config = json.loads((directory / "config.json").read_text("utf-8"))
    said = config.pop("quantization_config")
    del said["quant_method"]
    if kind == "awq":
        said = {"w_bit": said["bits"], "q_group_size": said["group_size"], "zero_point": True, "version": "GEMM"}
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    (directory / name).write_text(json.dumps(said), "utf-8")
    assert torch.equal(load(directory)(TOKENS).logits, expected)


def test_old_files_have_biases_of_zeros_where_the_model_has_none(tmp_path: Path) -> None:
    directory = with_tokenizer("gptq", tmp_path)
    expected = load(directory)(TOKENS).logits
    files, name = load_file(directory / "model.safetensors"), "model.layers.0.mlp.up_proj.bias"
    for bias in (torch.zeros(128), torch.ones(128)):
        save_file({**files, name: bias}, directory / "model.safetensors", metadata={"format": "pt"})
        if not bias.any():
            loaded = load_model(ModelSection(path=str(directory)), dtype=torch.float32)
            assert loaded.unexpected == ()
            assert torch.equal(loaded.model(TOKENS).logits, expected)
        else:
            with pytest.raises(ModelError, match="does not fit"):
                load(directory)


@pytest.mark.parametrize(
    ("kind", "said", "words"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "one kernel"),
        ("gptq", {"is_marlin_format": True}, "one kernel"),
        ("gptq", {"checkpoint_format": "bitblas"}, "one kernel"),
        ("gptq", {"bits": 5}, "this many bits"),
        ("gptq", {"bits": None}, "this many bits"),
        ("gptq", {"group_size": 0}, "group size"),
        ("gptq", {"group_size": 64}, "does not fit"),
        ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "module to module"),
        ("gptq", {"pack_dtype": "int16"}, "32 bits"),
        ("awq", {"version": "gemv"}, "this layout"),
        ("awq", {"version": "marlin"}, "this layout"),
        ("awq", {"backend": "llm-awq"}, "this layout"),
        ("awq", {"bits": 8}, "four bits"),
        ("awq", {"zero_point": False}, "zero points"),
        ("awq", {"group_size": 128}, "does not fit"),
    ],
)
def test_what_is_not_read_is_one_line(kind: str, said: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        load(with_tokenizer(kind, tmp_path, **said))
    assert "\n" not in caught.value.line()
    assert caught.value.remedy


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    directory = with_tokenizer("gptq", tmp_path)
    files, path = load_file(directory / "model.safetensors"), "model.layers.0.mlp.up_proj"
    changes: list[dict[str, Tensor | None]] = [
        {f"{path}.qzeros": None},
        {f"{path}.g_idx": files[f"{path}.g_idx"] + 9},
        {f"{path}.qweight": files[f"{path}.qweight"].float()},
        {"lm_head.qweight": files[f"{path}.qweight"].clone()},
        {"model.layers.0.mlp.act_fn.scales": torch.ones(128)},
        {"model.layers.0.mlp.experts.0.up_proj.qweight": files[f"{path}.qweight"].clone()},
    ]
    for change in changes:
        state = {name: tensor for name, tensor in {**files, **change}.items() if tensor is not None}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError) as caught:
            load(directory)
        assert "\n" not in caught.value.line()
        assert caught.value.remedy
