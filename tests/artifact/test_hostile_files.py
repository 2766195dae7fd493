"""Adapter files made to harm (S04, S18): each refused in one line that names the key or the tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from luthier.artifact.adapter_config import LARGEST_FILE, check_config, read_json, safe_pattern
from luthier.artifact.tensor_file import LARGEST_HEADER, MOST_TENSORS, check_header, read_tensors
from luthier.contracts.errors import LuthierError, ModelError
from luthier.models.replace import replace_directory

GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_mapping", {"base_model_class": "X", "parent_library": "os"}),
        ("megatron_config", {"a": 1}),
        ("megatron_core", "evil.module"),
        ("tokenizer_kwargs", {"trust_remote_code": True}),
        ("trust_remote_code", True),
        ("auto_map", {"AutoModel": "a.b"}),
        ("r", 1_000_000),
        ("r", 0),
        ("r", True),
        ("r", "8"),
        ("r", 8.0),
        ("lora_alpha", -1),
        ("lora_alpha", 1e300),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 1.5),
        ("target_modules", ["q"] * 100_001),
        ("target_modules", {"a": 1}),
        ("target_modules", [["q_proj"]]),
        ("target_modules", "x" * 5000),
        ("modules_to_save", ["(a+)+$"]),
        ("modules_to_save", "lm_head"),
        ("layers_pattern", "(a|a)*"),
        ("rank_pattern", {"(.*)*q": 4}),
        ("rank_pattern", {"q_proj": 10**6}),
        ("alpha_pattern", {".*.*.*.*q": 4}),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", "all"),
        ("trainable_token_indices", [2**40]),
        ("trainable_token_indices", {"embed_tokens": []}),
        ("bias", "everything"),
        ("task_type", "EVIL"),
        ("peft_type", "../../etc"),
        ("base_model_name_or_path", "a\nb"),
        ("use_rslora", 1),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1]),
    ],
)
def test_a_bad_value_is_refused_by_key(key: str, value: Any) -> None:
    with pytest.raises(ModelError) as caught:
        check_config({**GOOD, key: value}, "adapter_config.json")
    assert key in caught.value.line()
    assert len(caught.value.line()) < 700


def test_all_bad_keys_are_said_at_once() -> None:
    with pytest.raises(LuthierError) as caught:
        check_config({**GOOD, "r": -1, "bias": 3, "auto_map": {"a": "b"}}, "c.json")
    assert len(caught.value.line().splitlines()) == 3


def test_what_peft_writes_passes_without_a_note() -> None:
    written = {
        **GOOD, "auto_mapping": None, "megatron_core": "megatron.core", "megatron_config": None, "loftq_config": {},
        "qalora_group_size": 16, "layer_replication": None, "eva_config": None, "use_dora": False, "bias": "none",
    }  # fmt: skip
    clean, notes = check_config(written, "c.json")
    assert notes == []
    assert clean == {**GOOD, "use_dora": False, "bias": "none"}


@pytest.mark.parametrize("pattern", ["q_proj", r"layers\.[01]\.self_attn.*q_proj", "q_proj|k_proj", "(q|k)_proj"])
def test_ordinary_patterns_pass(pattern: str) -> None:
    assert safe_pattern(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|b)*", "(a){99}", r"(a)\1", ".*.*.*", "a++", "x" * 3000, 7])
def test_runaway_patterns_do_not(pattern: Any) -> None:
    assert not safe_pattern(pattern)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' * 100_000, '{"r": 1', "null"])
def test_what_is_not_an_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ModelError, match=r"c\.json"):
        read_json(tmp_path / "c.json")


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(" " * (LARGEST_FILE + 1))
    with pytest.raises(ModelError, match="too large"):
        read_json(tmp_path / "c.json")
    (tmp_path / "d.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelError, match="JSON"):
        read_json(tmp_path / "d.json")


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, header: Any, data: int, length: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, 24, "overlap"),
        ({"a": entry(0, 16, [4]), "b": entry(0, 16, [4])}, 32, "overlap"),
        ({"a": entry(4, 20, [4])}, 20, "gap"),
        ({"a": entry(0, 16, [4])}, 12, "header 16"),
        ({"a": entry(0, 16, [4])}, 20, "header 16"),
        ({"a": entry(0, 16, [5])}, 16, "add up"),
        ({"a": entry(0, 16, [2**62, 4])}, 16, "add up"),
        ({"a": entry(0, 16, [-4])}, 16, "add up"),
        ({"a": entry(0, 16, [4], "BF16")}, 16, "add up"),
        ({"a": entry(0, 16, [4], "F999")}, 16, "add up"),
        ({"a": entry(0, 16, [4.0])}, 16, "add up"),
        ({"a": {"dtype": "F32"}}, 16, "add up"),
        ({"a": 3}, 16, "add up"),
        ([1], 0, "not an object"),
        ({str(i): entry(0, 0, [0]) for i in range(MOST_TENSORS + 1)}, 0, "more than"),
    ],
)
def test_a_header_that_does_not_add_up_is_refused(header: Any, data: int, says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says):
        read_tensors(write(tmp_path / "t.safetensors", header, data))


@pytest.mark.parametrize("length", [LARGEST_HEADER + 1, 2**63, 1000])
def test_a_header_that_claims_too_much_is_not_read(length: int, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="header must fit"):
        check_header(write(tmp_path / "t.safetensors", {}, 0, length))


def test_a_short_or_garbled_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"abc")
    with pytest.raises(ModelError):
        check_header(tmp_path / "t")
    (tmp_path / "t").write_bytes(struct.pack("<Q", 4) + b"{{{{")
    with pytest.raises(ModelError, match="safetensors"):
        check_header(tmp_path / "t")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_names_its_tensor(value: float, tmp_path: Path) -> None:
    save_file({"good": torch.ones(3), "bad.weight": torch.tensor([1.0, value])}, tmp_path / "t.safetensors")
    with pytest.raises(ModelError, match=r"bad\.weight"):
        read_tensors(tmp_path / "t.safetensors")


def test_a_good_file_reads_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "b": torch.zeros(0, 4), "c": torch.randn(5).to(torch.bfloat16)}
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    assert check_header(tmp_path / "t.safetensors") == {"a": (3, 2), "b": (0, 4), "c": (5,)}
    read = read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_replacing_a_directory_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep/out"
    with replace_directory(target) as fresh:
        (fresh / "a").write_text("1")
    with pytest.raises(KeyError), replace_directory(target) as fresh:
        (fresh / "a").write_text("2")
        raise KeyError
    assert (target / "a").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["out"]
