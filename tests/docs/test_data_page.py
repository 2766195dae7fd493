"""The recipe and the commands of docs/data.md, run as they stand, on real rows: built, accounted for, trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from docs.test_commands import BLOCK, ROOT, commands, program, run_program
from luthier.cli.main import main
from luthier.data.applied import read
from luthier.data.texts import whole

PAGE = "docs/data.md"
FILES = {
    "alpaca.json": "raw/llamafactory/alpaca_en_demo.json", "sharegpt.json": "raw/fastchat/dummy_conversation.json",
    "chinese.json": "raw/llamafactory/alpaca_zh_demo.json", "wiki.txt": "raw/llamafactory/wiki_demo.txt",
    "gsm8k.jsonl": "raw/gsm8k/train_first.jsonl", "gsm8k_test.jsonl": "raw/gsm8k/test.jsonl",
    "mt_bench.jsonl": "raw/fastchat/mt_bench_question.jsonl",
}  # fmt: skip
MOST = 150  # rows of a file: the road is the same, the walk is shorter


@pytest.fixture
def place(tmp_path: Path, shared_data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name, source in FILES.items():
        _first_rows(shared_data(source), tmp_path / "data" / name)
    planted = (tmp_path / "data" / "gsm8k_test.jsonl").read_text("utf-8").splitlines(keepends=True)[:5]
    with (tmp_path / "data" / "gsm8k.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(planted)  # five questions of the test set among the training rows
    shutil.copytree(shared_data("models/potion-base-4m-int8"), tmp_path / "potion")
    shutil.copytree(shared_data("models/stories260K-chatml"), tmp_path / "base")
    recipe = next(text for language, text in BLOCK.findall((ROOT / PAGE).read_text("utf-8")) if language == "yaml")
    (tmp_path / "clean.yaml").write_text(recipe.replace("max_steps: 20", "max_steps: 2"), "utf-8")
    return tmp_path


def test_the_whole_road(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ran = []
    for words in commands(PAGE):
        if words[1] == "verdicts" or "slurm" in words:
            continue  # a person fills in the sheet; a cluster runs the jobs
        assert main(words) == 0, f"luthier {' '.join(words)}\n{''.join(capfd.readouterr())}"
        ran.append(" ".join(words[:2]))
    assert ran == ["data build", "data report", "data show", "train clean.yaml", "data sample"]
    built = place / "runs" / "clean" / "built"
    ledger = json.loads((built / "ledger.json").read_text("utf-8"))
    there = ledger["sources"]["kept"]
    for step in ledger["steps"]:
        left = sum(one["count"] for one in step["left"].values())
        assert step["read"] == there and step["read"] + sum(step["added"].values()) == step["kept"] + left
        there = step["kept"]
    assert there == ledger["rows"] == len((built / "train.jsonl").read_bytes().splitlines()) > 100
    steps = {step["name"]: step for step in ledger["steps"]}
    assert sum(one["count"] for one in steps["decontaminate"]["left"].values()) >= 5
    tested = {whole(record) for record in islice(read("data/gsm8k_test.jsonl"), 5)}
    assert not tested & {whole(record) for record in read(str(built / "train.jsonl"))}
    sources = steps["mix"]["figures"]["sources"]
    assert sources.keys() == {"maths", "instructions", "chinese", "general"}
    for source in (one for one in sources.values() if one["rows_taken"] >= 10):  # of fewer, a row is a large share
        assert source["share_realised"] == pytest.approx(source["share_asked"], abs=0.05)
    card = (built / "README.md").read_text("utf-8")
    assert card.startswith("---\n") and "decontaminate" in card
    run = json.loads((place / "runs" / "clean" / "data" / "ledger.json").read_text("utf-8"))
    assert run["build"]["rows"] == ledger["rows"] and (place / "runs" / "clean" / "adapter").is_dir()


def test_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "One "}\n', "utf-8")
    assert "apply" in program(PAGE)
    run_program(PAGE, tmp_path)


def _first_rows(source: Path, target: Path) -> None:
    """The first rows of a file, in its own form."""
    if source.suffix == ".json":
        target.write_text(json.dumps(json.loads(source.read_text("utf-8"))[:MOST], ensure_ascii=False), "utf-8")
    elif source.suffix == ".txt":
        target.write_text(source.read_text("utf-8")[:20_000], "utf-8")
    else:
        target.write_text("".join(islice(_lines(source), MOST)), "utf-8")


def _lines(source: Path) -> Iterator[str]:
    with source.open(encoding="utf-8") as file:
        yield from file
