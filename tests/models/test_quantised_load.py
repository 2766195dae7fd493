"""Loading into a storage format: what comes out, what it needs on the way, and checkpoints that are packed already."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from luthier.contracts.errors import ModelError
from luthier.methods.lora import LoRA
from luthier.models.load import Loaded, load_model, save_whole
from luthier.models.quantise import format_of, is_double, quantisable, quantise
from luthier.models.switch import native_attention
from luthier.models.weights import dynamic_map, nf4
from luthier.models.weights.nf4 import NF4Linear
from luthier.models.weights.packed import Packed
from luthier.recipe.recipe import ModelSection
from tiny import tiny, tiny_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden/bitsandbytes"
TOKENS = torch.arange(12)[None]


def saved(directory: Path, family: str = "llama", **changes: object) -> Path:
    tokenizer = tiny_tokenizer()
    return save_whole(tiny(family, **changes), tokenizer, tokenizer.chat_template, directory / family)


def load(path: Path, name: str = "nf4", dtype: torch.dtype = torch.float32, **changes: Any) -> Loaded:
    return load_model(ModelSection(path=str(path), quantization=name, **changes), dtype=dtype)


def with_tokenizer(directory: Path, tmp_path: Path) -> Path:
    target = Path(shutil.copytree(directory, tmp_path / "model"))
    tiny_tokenizer().save_pretrained(target)
    return target


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_it_is_the_model_quantised_afterwards(family: str, name: str, tmp_path: Path) -> None:
    loaded = load(saved(tmp_path, family), name)
    expected = quantise(tiny(family), name)
    state, wanted = loaded.model.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert loaded.unexpected == ()
    assert "quantization_config" not in loaded.model.config.to_dict()
    assert not hasattr(loaded.model, "hf_quantizer")


def test_scales_stay_in_fp32_where_asked(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    assert is_double(load(directory).model)
    assert not is_double(load(directory, double_quantization=False).model)


def test_bf16_is_rounded_first(tmp_path: Path) -> None:
    """As everybody does: the codes are those of the model in its number format."""
    loaded = load(saved(tmp_path), dtype=torch.bfloat16).model
    expected = quantise(tiny("llama").bfloat16(), "nf4")
    wanted = {path: m for path, m in expected.named_modules() if isinstance(m, Packed)}
    assert len(wanted) == 14
    assert all(torch.equal(loaded.get_submodule(path).weight, m.weight) for path, m in wanted.items())
    assert loaded(TOKENS).logits.dtype == torch.bfloat16
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16


LOADS = [
    ("fp32", "nf4", "float32"),
    ("bf16", "nf4", "float32"),
    ("shards", "nf4", "bfloat16"),
    ("fp32", "int8", "float32"),
]
MEBIBYTE = 2**20


def test_dense_and_packed_are_never_there_together(tmp_path: Path) -> None:
    """Under a hard limit of private memory: the packed model, its largest matrix twice, 4 MiB for the pieces.

    The dense model does not fit under the same limit, which is what makes it one.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 300}
    warm, model, tokenizer = saved(tmp_path / "warm"), tiny("llama", **sizes), tiny_tokenizer()
    save_whole(model, tokenizer, tokenizer.chat_template, tmp_path / "fp32")
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    save_whole(model.bfloat16(), tokenizer, tokenizer.chat_template, tmp_path / "bf16")
    with native_attention(model):
        model.save_pretrained(tmp_path / "shards", max_shard_size="6MB")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 4
    asked: list[list[str]] = []
    for files, kind, dtype in LOADS:
        mapped = sum(file.stat().st_size for file in (tmp_path / files).glob("*.safetensors"))
        packed = packed_bytes(model, kind, 4 if dtype == "float32" else 2) + buffers
        limit = packed + 2 * 4 * 512 * 1024 + 4 * MEBIBYTE
        asked.append([str(tmp_path / files), kind, dtype, str(limit), str(mapped)])
    asked.append([str(tmp_path / "bf16"), "none", "float32", asked[-1][3], asked[-1][4]])
    seen = loads_under_limits(warm, asked)
    for words, found in zip(asked[:-1], seen[:-1], strict=True):
        assert found["loaded"], (words, found)
        stored = found["stored"]
        assert int(words[3]) - 2 * 4 * 512 * 1024 - 4 * MEBIBYTE == stored  # the limit is that of this model
        assert found["kept"] < stored + 4 * MEBIBYTE, (words, found)  # no file is mapped any more
    assert not seen[-1]["loaded"]


def packed_bytes(model: Any, kind: str, other: int) -> int:
    """What the model takes in a format: its linears so, everything else in numbers of `other` bytes."""
    count = sum(p.numel() for p in model.parameters())
    body = [m.weight.shape for m in quantisable(model).values()]
    linears = sum(o * d for o, d in body)
    if kind == "int8":
        return linears + sum(4 * o for o, _ in body) + (count - linears) * other
    blocks = [o * d // 64 for o, d in body]
    scales = sum(b + 4 * -(-b // dynamic_map.BLOCK) + 4 for b in blocks)
    return linears // 2 + scales + (count - linears) * other


def loads_under_limits(warm: Path, asked: list[list[str]]) -> list[dict[str, Any]]:
    """Each load in a program of its own; memory that is freed there is given back at once."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # fmt: skip
    program = Path(__file__).with_name("load_under_limit.py")
    words = [sys.executable, str(program), str(warm), *(word for line in asked for word in line)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_checkpoint_of_bitsandbytes_loads_as_it_is(tmp_path: Path) -> None:
    directory = with_tokenizer(GOLDEN / "model", tmp_path)
    loaded = load(directory, "none")
    assert (format_of(loaded.model), is_double(loaded.model), loaded.unexpected) == ("nf4", True, ())
    files = load_file(directory / "model.safetensors")
    for path, module in loaded.model.named_modules():
        if isinstance(module, Packed):
            assert torch.equal(module.weight, files[f"{path}.weight"])
            assert torch.equal(module.absmax, files[f"{path}.weight.absmax"])
    dense = tiny("llama", intermediate_size=128, num_hidden_layers=1)
    fresh = quantise(tiny("llama", intermediate_size=128, num_hidden_layers=1), "nf4")
    for path, module in fresh.named_modules():
        if isinstance(module, NF4Linear):
            theirs: Any = loaded.model.get_submodule(path)
            assert torch.equal(module.weight, theirs.weight)
            assert torch.equal(module.nested_absmax, theirs.nested_absmax)
            assert torch.equal(module.nested_offset, theirs.nested_offset)
            weight = dense.get_submodule(path).weight
            assert not differ_away_from_a_boundary(weight, module, theirs.absmax)
    assert torch.equal(load(directory, "nf4").model(TOKENS).logits, loaded.model(TOKENS).logits)
    with pytest.raises(ModelError, match="nf4 already"):
        load(directory, "int8")


def differ_away_from_a_boundary(weight: torch.Tensor, mine: Any, theirs: torch.Tensor) -> list[int]:
    """Scales whose codes differ though they are not just where two codes part.

    bitsandbytes' CPU kernel was measured to take the neighbour within 2^-16 of the middle; ours takes the nearest.
    """
    absmax = nf4.quantise(weight).absmax
    scaled = (absmax - absmax.mean()) / mine.nested_absmax.repeat_interleave(dynamic_map.BLOCK)[: len(absmax)]
    values = dynamic_map.create_dynamic_map()
    nearest = (scaled[:, None] - (values[:-1] + values[1:]) / 2).abs().amin(1)
    return ((mine.absmax != theirs) & (nearest > 2.0**-16)).nonzero().flatten().tolist()


def test_qlora_is_pefts_on_bitsandbytes(tmp_path: Path) -> None:
    """Logits and the gradients of the adapter, as PEFT made them over bitsandbytes' Linear4bit."""
    golden = load_file(GOLDEN / "qlora.safetensors")
    model = load(with_tokenizer(GOLDEN / "model", tmp_path), "none").model
    method = LoRA(r=4, lora_alpha=8)
    method.attach(model)
    method.load(model, {name.removeprefix("adapter."): t for name, t in golden.items() if name.startswith("adapter.")})
    scores = model(golden["tokens"]).logits
    torch.testing.assert_close(scores, golden["logits"], atol=1e-5, rtol=1e-4)
    functional.cross_entropy(scores[:, :-1].flatten(0, 1), golden["tokens"][:, 1:].flatten()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: t for name, t in golden.items() if name.startswith("gradient.")}
    assert len(found) == len(expected) == 14
    for name, gradient in expected.items():
        path, _, matrix = name.removeprefix("gradient.base_model.model.").rpartition(".lora_")
        mine = found[f"{path}.delta.lora_{matrix.removesuffix('.weight')}"]
        torch.testing.assert_close(mine, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "name"), [("llama", "nf4"), ("gpt2", "int8"), ("gpt2", "nf4")])
@pytest.mark.parametrize("double", [True, False])
def test_what_is_saved_packed_comes_back(family: str, name: str, double: bool, tmp_path: Path) -> None:
    model, tokenizer = quantise(tiny(family), name, double=double), tiny_tokenizer()
    directory = save_whole(model, tokenizer, tokenizer.chat_template, tmp_path / "packed")
    again = load(directory, "none").model
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert (format_of(again), is_double(again)) == (name, double and name == "nf4")
    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "bitsandbytes"


@pytest.mark.parametrize(
    "method",
    ["hqq", "fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "aqlm", "eetq", "auto-round", "torchao", "exl2"],
)
def test_other_quantised_checkpoints_get_one_line(method: str, tmp_path: Path) -> None:
    directory = saved(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(ModelError, match=f"quantised by {method}") as caught:
        load(directory, "none")
    assert "\n" not in caught.value.line()
    assert ("bf16 release" if "fp" in method else "model.quantization: nf4") in str(caught.value.remedy)


def test_damaged_packed_files_are_refused(tmp_path: Path) -> None:
    directory = with_tokenizer(GOLDEN / "model", tmp_path)
    files = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**files, name: files[name][:-1].clone()}, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not fit"):
        load(directory, "none")


def test_fp8_on_a_cpu_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="fp8 is a GPU's"):
        load(tmp_path / "nowhere", "fp8")
