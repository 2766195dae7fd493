"""Merging an adapter whose base was packed in training: both ways measured, and one line without saying which."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from luthier import run
from luthier.artifact.adapter import load_adapter, read_adapter, save_adapter
from luthier.cli.main import door
from luthier.contracts.errors import UsageError
from luthier.data.prepare import prepare
from luthier.methods.lora import LoRA
from luthier.models.load import load_model, save_whole
from luthier.models.quantise import format_of, quantise
from luthier.opened import open_target, storage_of
from luthier.recipe.recipe import DataSection, DataSource, ModelSection
from methods.rig import stir
from tiny import tiny, tiny_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden/grouped"
TOKENS = torch.randint(0, 300, (3, 21), generator=torch.Generator().manual_seed(2))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def opened(path: Path) -> nn.Module:
    return load_model(ModelSection(path=str(path)), dtype=torch.float32).model


@pytest.fixture(params=["llama-nf4", "gpt2-int8"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, nn.Module, str]:
    """(its directory, the adapted model, its format)."""
    family, name = request.param.split("-")
    tokenizer = tiny_tokenizer()
    base = save_whole(tiny(family), tokenizer, tokenizer.chat_template, tmp_path / "base")
    section = ModelSection(path=str(base), quantization=name)
    loaded = load_model(section, dtype=torch.float32)
    method = LoRA(r=4)
    method.attach(loaded.model)
    stir(loaded.model)
    saved = save_adapter(
        tmp_path / "adapter", method, loaded.model, base_path=str(base), base_fingerprint=loaded.fingerprint
    )
    tokenizer.save_pretrained(saved)
    return saved, loaded.model, name


def test_the_file_says_how_its_base_was_stored(adapter: tuple[Path, nn.Module, str]) -> None:
    directory, model, name = adapter
    assert read_adapter(directory).base_storage == {"quantization": name, "double_quantization": name == "nf4"}
    assert storage_of(directory) == name
    again = open_target(directory).model
    assert format_of(again) == name
    assert torch.equal(logits(again), logits(model))


def test_without_saying_into_what_it_is_one_line(adapter: tuple[Path, nn.Module, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="say into what") as caught:
        run.merge(adapter[0], tmp_path / "out")
    assert "\n" not in caught.value.line()
    assert "--into dense" in caught.value.line()
    assert "--into quantised" in caught.value.line()
    assert not (tmp_path / "out").exists()


def test_into_the_dense_base(adapter: tuple[Path, nn.Module, str], tmp_path: Path) -> None:
    directory, model, name = adapter
    report = run.merge(directory, tmp_path / "out", into="dense")
    merged = opened(tmp_path / "out")
    assert format_of(merged) == "none"
    expected = opened(tmp_path / "base")
    load_adapter(directory, expected).merge(expected)
    assert torch.equal(logits(merged), logits(expected))
    away = float((logits(merged) - logits(model)).abs().max())
    assert away > 0
    assert report["max_logit_difference"] == report["difference_into_dense"] > 0
    assert report["difference_into_quantised"] > 0
    assert report["stored"] == name


def test_into_the_quantised_base(adapter: tuple[Path, nn.Module, str], tmp_path: Path) -> None:
    directory, _, name = adapter
    report = run.merge(directory, tmp_path / "out", into="quantised")
    merged = opened(tmp_path / "out")
    assert format_of(merged) == name
    dense = opened(tmp_path / "base")
    load_adapter(directory, dense).merge(dense)
    assert report["max_logit_difference"] == report["difference_into_quantised"]
    near, far = logits(merged) - logits(dense), logits(opened(tmp_path / "base")) - logits(dense)
    assert near.norm() < far.norm()  # the change is in it


def test_a_dense_base_has_no_quantised_merge(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    base = save_whole(tiny("llama"), tokenizer, tokenizer.chat_template, tmp_path / "base")
    model, method = tiny("llama"), LoRA(r=2)
    method.attach(model)
    saved = save_adapter(tmp_path / "adapter", method, model, base_path=str(base))
    tokenizer.save_pretrained(saved)
    with pytest.raises(UsageError, match="not quantised"):
        run.merge(saved, tmp_path / "out", into="quantised")
    assert "into" not in run.merge(saved, tmp_path / "out", into="dense")


@pytest.mark.parametrize("kind", ["nf4", "gptq", "awq"])
def test_a_base_whose_files_are_packed_unpacks_for_a_dense_merge(kind: str, tmp_path: Path) -> None:
    """Nothing is lost there but rounding; packed again, the change is rounded to the same grid."""
    tokenizer = tiny_tokenizer()
    if kind == "nf4":
        base = save_whole(quantise(tiny("llama"), "nf4"), tokenizer, tokenizer.chat_template, tmp_path / "base")
    else:
        base = Path(shutil.copytree(GOLDEN / kind, tmp_path / "base"))
        tokenizer.save_pretrained(base)
    model, method = opened(base), LoRA(r=2)
    method.attach(model)
    stir(model)
    saved = save_adapter(tmp_path / "adapter", method, model, base_path=str(base))
    tokenizer.save_pretrained(saved)
    assert storage_of(saved) == kind
    assert torch.equal(logits(open_target(saved).model), logits(model))
    report = run.merge(saved, tmp_path / "out", into="dense")
    merged = opened(tmp_path / "out")
    assert format_of(merged) == "none"
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-4)
    assert report["dense_is_unpacked"]
    assert report["difference_into_dense"] < 1e-4 < report["difference_into_quantised"]
    again = run.merge(saved, tmp_path / "packed", into="quantised")
    packed = opened(tmp_path / "packed")
    assert format_of(packed) == kind
    untouched = opened(base)
    assert (logits(packed) - logits(model)).norm() < (logits(untouched) - logits(model)).norm()  # the change is in it
    away = float((logits(packed) - logits(model)).abs().max())
    assert away > 1e-4
    assert again["difference_into_quantised"] == report["difference_into_quantised"]
    if kind != "nf4":
        scales = {n: b for n, b in untouched.named_buffers() if n.endswith((".scale", ".zero", ".places"))}
        found = dict(packed.named_buffers())
        assert len(scales) >= 14
        assert all(torch.equal(found[name], value) for name, value in scales.items())


def test_the_loss_is_measured_beside_the_logits(adapter: tuple[Path, nn.Module, str], tmp_path: Path) -> None:
    """On rows of one's own: the loss of the next token of the adapted model, and of both merges."""
    directory, model, _ = adapter
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "The cat sat on the mat and looked at the moon."}\n{"text": "Once upon a time."}\n')
    report = run.merge(directory, tmp_path / "out", into="dense", on=str(rows))
    assert report["tokens"] > 10
    merged = opened(tmp_path / "out")
    for name, one in (("loss_adapted", model), ("loss_merged", merged)):
        assert abs(report[name] - mean_loss(one, directory, rows)) < 1e-5
    assert report["loss_into_dense"] == report["loss_merged"] != report["loss_adapted"]
    assert report["loss_into_quantised"] not in (report["loss_into_dense"], report["loss_adapted"])


def mean_loss(model: nn.Module, directory: Path, rows: Path) -> float:
    section = DataSection(train=(DataSource(path=str(rows)),))
    samples = prepare(section, open_target(directory).encoder, seed=0, kinds=("Text",)).train
    total, count = 0.0, 0
    for sample in samples:
        ids = torch.tensor([[int(token) for piece in sample.pieces for token in piece.tokens]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


def test_the_command_prints_both(adapter: tuple[Path, nn.Module, str], tmp_path: Path) -> None:
    done = CliRunner().invoke(door, ["merge", str(adapter[0]), "--out", str(tmp_path / "out"), "--into", "dense"])
    assert done.exit_code == 0, done.output
    assert "into the dense base: largest difference" in done.output
    assert "into the quantised base: largest difference" in done.output
    assert done.output.count("perplexity") == 3
    assert done.output.count(", written") == 1
    assert f"a base in {adapter[2]}" in done.output
