"""Loading: nothing that runs code, safetensors only, whole files, one-line errors; new tokens; saving back."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.contracts.errors import Errors, ModelError
from luthier.models.directory import fingerprint, scan, tensor_header
from luthier.models.load import Loaded, load_model, save_whole
from tiny import tiny, tiny_tokenizer


@dataclass(frozen=True)
class Section:
    """Stand-in of the recipe's model section."""

    path: str
    revision: str | None = None
    quantization: str = "none"
    double_quantization: bool = True
    add_tokens: tuple[str, ...] = ()
    chat_template: str | None = None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_tokenizer()
    return save_whole(tiny("llama"), tokenizer, tokenizer.chat_template, tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(path: Path | str, **changes: object) -> Loaded:
    return load_model(Section(str(path), **changes), dtype=torch.float32)  # type: ignore[arg-type]


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_save_and_load_are_inverse(saved: Path) -> None:
    loaded = load(saved)
    original = tiny("llama")
    assert all(torch.equal(original.state_dict()[n], t) for n, t in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert loaded.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert loaded.generation_stop_ids == (260,)
    assert loaded.unexpected == ()
    assert loaded.tokenizer("<|im_end|>")["input_ids"] == [260]


def test_dtype_is_the_callers(saved: Path) -> None:
    section = Section(str(saved))
    assert load_model(section, dtype=torch.bfloat16).model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("file", "changes", "where"),
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ("config.json", {"_attn_implementation_internal": "org/kernel"}, "_attn_implementation_internal"),
        ("config.json", {"_attn_implementation": "eager"}, "_attn_implementation"),
        (
            "config.json",
            {"text_config": {"deep": [{"trust_remote_code": True}]}},
            "text_config.deep[0].trust_remote_code",
        ),
        ("config.json", {"attn_implementation": {"": "org/kernel@main"}}, "attn_implementation"),
        ("config.json", {"experts_implementation": "org/experts"}, "experts_implementation"),
        ("config.json", {"use_kernel": "org/kernels:Layer"}, "use_kernel"),
        ("generation_config.json", {"custom_generate": "org/decode"}, "custom_generate"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tok", None]}}, "auto_map"),
    ],
)
def test_keys_that_lead_to_code_are_refused_before_anything_is_loaded(
    directory: Path, file: str, changes: dict[str, object], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    (directory / "evil.py").write_text("raise SystemExit('ran')")
    edit(directory / file, **changes)
    with pytest.raises(ModelError, match="leads to code") as caught:
        load(directory)
    assert caught.value.where == f"{directory / file}: {where}"
    assert "\n" not in caught.value.line()


def test_harmless_settings_of_those_names_pass(directory: Path) -> None:
    edit(directory / "config.json", _attn_implementation_autoset=True, trust_remote_code=False, auto_map=None)
    assert scan(directory)["model_type"] == "llama"


def test_all_objections_at_once(directory: Path) -> None:
    edit(directory / "config.json", auto_map={"a": "b"}, trust_remote_code=True)
    with pytest.raises(Errors) as caught:
        load(directory)
    assert len(caught.value.errors) == 2


def test_pickled_weights_are_refused_with_the_remedy(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle can run any code") as caught:
        load(directory)
    assert "save_pretrained" in caught.value.line()
    assert caught.value.exit_code == 2


def test_pickles_beside_the_weights_are_never_opened(directory: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (directory / name).write_bytes(b"cos\nsystem\n(S'exit 9'\ntR.")
    assert load(directory).unexpected == ()


@pytest.mark.parametrize("damage", ["cut", "long", "header", "empty"])
def test_a_damaged_weight_file_is_one_line(directory: Path, damage: str) -> None:
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    changed = {"cut": whole[:-9], "long": whole + b"x", "header": b"\xff" * 8 + whole[8:], "empty": b""}[damage]
    file.write_bytes(changed)
    with pytest.raises(ModelError) as caught:
        load(directory)
    assert str(file) in caught.value.line()


def test_missing_and_misshapen_weights_are_counted_and_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    dropped = {name: t for name, t in tensors.items() if "layers.1" not in name}
    save_file(dropped, file)
    with pytest.raises(ModelError, match=f"{len(tensors) - len(dropped)} of the model's weights are missing"):
        load(directory)
    save_file({**tensors, "lm_head.weight": torch.zeros(4, 4)}, file)
    with pytest.raises(ModelError):
        load(directory)


def test_weights_without_a_place_are_listed(directory: Path) -> None:
    file = directory / "model.safetensors"
    save_file({**load_file(file), "vision.weight": torch.zeros(2)}, file)
    assert load(directory).unexpected == ("vision.weight",)


def test_a_shard_outside_the_directory_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="beside its index"):
        load(directory)


@pytest.mark.parametrize(
    ("path", "what"), [("no/such-model", "hf download no/such-model"), ("/no/such/dir", "pass a local directory")]
)
def test_what_is_not_there_teaches(path: str, what: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(path)
    assert what in caught.value.line()


def test_adapters_other_families_and_quantised_bases_are_named(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter, not a model"):
        load(tmp_path / "adapter")
    assert load(directory, quantization="nf4").model is not None
    edit(directory / "config.json", quantization_config={"bits": 4})
    with pytest.raises(ModelError, match="quantised"):
        load(directory)
    edit(directory / "config.json", quantization_config=None, model_type="vit")
    with pytest.raises(ModelError, match="not a causal language model"):
        load(directory)
    (directory / "config.json").write_text('{"model_type": \n "llama"')
    with pytest.raises(ModelError) as caught:
        load(directory)
    assert "config.json:2:" in caught.value.line()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_added_tokens_are_atomic_and_start_at_the_mean(tmp_path: Path, family: str) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny(family, vocab_size=len(tokenizer))
    used = len(tokenizer)
    path = save_whole(model, tokenizer, None, tmp_path / "m")
    loaded = load(path, add_tokens=("<|tool|>", "<|im_end|>", "<think>"))
    assert loaded.added == {"<|tool|>": used, "<|im_end|>": 260, "<think>": used + 1}
    assert loaded.tokenizer("a<|tool|>b<think>")["input_ids"][1::2] == [used, used + 1]
    before, after = model.get_input_embeddings().weight, loaded.model.get_input_embeddings().weight
    assert torch.equal(after[:used], before)
    torch.testing.assert_close(after[used:], before.mean(0).expand(2, -1))
    head = loaded.model.get_output_embeddings().weight
    assert (head is after) == (family == "gpt2")
    torch.testing.assert_close(head[used:], model.get_output_embeddings().weight.mean(0).expand(2, -1))
    again = load(save_whole(loaded.model, loaded.tokenizer, None, tmp_path / "n"), add_tokens=("<|tool|>",))
    assert again.added == {"<|tool|>": used}
    assert torch.equal(again.model.get_input_embeddings().weight, after)


def test_spare_rows_take_new_tokens_without_growing(directory: Path) -> None:
    loaded = load(directory, add_tokens=("<|tool|>",))
    table = loaded.model.get_input_embeddings().weight
    assert table.shape[0] == 300
    used = loaded.added["<|tool|>"]
    torch.testing.assert_close(table[used], table[:used].mean(0))


def test_the_fingerprint_tells_one_changed_weight(directory: Path) -> None:
    before = fingerprint(directory)
    assert before == fingerprint(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint(directory) != before
    assert tensor_header(file).startswith(b"{")


def test_real_checkpoints_load(shared_data) -> None:
    loaded = load(shared_data("models/stories260K-chatml"))
    assert loaded.tokenizer.chat_template.startswith("{% for m in messages %}")
    assert loaded.generation_stop_ids == (513,)
    with pytest.raises(ModelError, match="model2vec"):
        load(shared_data("models/potion-base-4m-int8"))


def test_a_model_is_replaced_as_a_whole(saved: Path, tmp_path: Path) -> None:
    """A save that fails half-way leaves the old directory, byte for byte, and nothing beside it."""
    loaded = load(saved)
    path = save_whole(loaded.model, loaded.tokenizer, None, tmp_path / "m")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(AttributeError):
        save_whole(loaded.model, None, "other", path)  # type: ignore[arg-type]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_word_of_the_tokenizer_is_no_control_token(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.add_tokens.*\['a'\]"):
        load(directory, add_tokens=("<|tool|>", "a"))
