"""Wishes for low memory that cannot be had: exit code and one line each, with what to do instead, through the door."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from luthier.cli.main import main
from luthier.models.load import save_whole
from tiny import tiny, tiny_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden/grouped"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, packed (a GPTQ checkpoint), rows.jsonl, and nf4.yaml."""
    here, tokenizer = tmp_path_factory.mktemp("wishes"), tiny_tokenizer()
    save_whole(
        tiny("llama", intermediate_size=128, num_hidden_layers=1), tokenizer, tokenizer.chat_template, here / "base"
    )
    shutil.copytree(GOLDEN / "gptq", here / "packed")
    tokenizer.save_pretrained(here / "packed")
    rows = [json.dumps({"prompt": f"What is {i} + 1?", "completion": str(i + 1)}) for i in range(12)]
    (here / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (here / "nf4.yaml").write_text(
        f"model: {{path: {here / 'base'}, quantization: nf4}}\ndata: {here / 'rows.jsonl'}\n"
        f"method: {{name: lora, r: 4}}\ntrain: {{max_steps: 1, tokens_per_step: 64}}\noutput_dir: {here / 'run'}\n"
    )
    return here


def refused(words: list[str], code: int, capsys: Capture) -> str:
    """What the door says on stderr, its notes aside: one line."""
    assert main(words) == code
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("note: ", "warning: "))]
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize("method", ["full", "galore", "spectrum"])
def test_four_bits_with_a_method_that_trains_them(method: str, place: Path, capsys: Capture) -> None:
    said = refused(["train", str(place / "nf4.yaml"), f"method={method}"], 2, capsys)
    assert "model.quantization" in said
    assert "none" in said.rpartition("—")[2]


def test_fp8_on_a_cpu(place: Path, capsys: Capture) -> None:
    said = refused(["train", str(place / "nf4.yaml"), "model.quantization=fp8", "engine.device=cpu"], 2, capsys)
    assert "GPU" in said
    assert "nf4 or int8" in said


def test_a_merge_without_saying_into_what(place: Path, capsys: Capture) -> None:
    words = ["train", str(place / "nf4.yaml"), f"output_dir={place / 'merged-run'}"]
    assert main(words) == 0
    assert "--out merged --into dense" in capsys.readouterr().out
    said = refused(["merge", str(place / "merged-run"), "--out", str(place / "out")], 2, capsys)
    assert "--into dense" in said
    assert "--into quantised" in said
    assert not (place / "out").exists()


def test_a_start_on_a_base_that_was_packed_long_ago(place: Path, capsys: Capture) -> None:
    words = ["train", str(place / "nf4.yaml"), f"model.path={place / 'packed'}", "model.quantization=none"]
    said = refused([*words, "method.init_lora_weights=pissa"], 2, capsys)
    assert "before it was rounded" in said
    assert "dense model" in said


def test_another_format_than_the_files_have(place: Path, capsys: Capture) -> None:
    said = refused(["train", str(place / "nf4.yaml"), f"model.path={place / 'packed'}"], 2, capsys)
    assert "in gptq already" in said
    assert "set it to none" in said


def test_a_gptq_base_trains_evaluates_and_merges(place: Path, capsys: Capture) -> None:
    words = ["train", str(place / "nf4.yaml"), f"model.path={place / 'packed'}", "model.quantization=none"]
    assert main([*words, f"output_dir={place / 'gptq-run'}"]) == 0
    assert main(["evaluate", str(place / "gptq-run"), "--on", str(place / "rows.jsonl")]) == 0
    capsys.readouterr()
    done = ["merge", str(place / "gptq-run"), "--out", str(place / "gptq-merged"), "--into", "dense", "--json"]
    assert main(done) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["stored"] == "gptq"
    assert report["dense_is_unpacked"]
    assert report["difference_into_dense"] < 1e-4


def test_a_method_that_trains_weights_on_packed_files(place: Path, capsys: Capture) -> None:
    words = ["train", str(place / "nf4.yaml"), f"model.path={place / 'packed'}", "model.quantization=none"]
    said = refused([*words, "method=full"], 2, capsys)
    assert "give a dense model" in said


def test_paged_without_a_gpu_is_said_in_one_line(place: Path, capsys: Capture) -> None:
    words = ["train", str(place / "nf4.yaml"), "train.optimizer=paged_adamw_8bit", "engine.device=cpu"]
    assert main([*words, f"output_dir={place / 'paged-run'}"]) == 0
    shown = capsys.readouterr()
    said = [line for line in (shown.out + shown.err).splitlines() if "page" in line and "adamw_8bit" in line]
    assert len(said) == 1, said
