"""The card: the same bytes of the same build, front matter that the hub reads, cells that cannot break out."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import DatasetCard
from numpy.typing import NDArray

from data.build_rig import Sift, contents
from luthier.cli.main import main
from luthier.contracts.errors import LuthierError
from luthier.contracts.step import Decision, Room, Rows, SetStep, no_sketch
from luthier.data.build import BuildSpec, build
from luthier.data.card import README, STATS, CardWords
from luthier.data.card_tables import inline, plain_figures, table
from luthier.data.set_report import make_card, set_report
from luthier.data.steps.exact_dedup import ExactDedup
from luthier.recipe.recipe import DataSource

Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True, kw_only=True)
class Figured(SetStep):
    """Keeps all and says figures."""

    def sketch(self, room: Room) -> Any:
        return no_sketch

    def decide(self, sketches_B: NDArray[Any], rows: Rows, room: Room) -> Decision:
        ones = np.ones(len(rows), np.int64)
        figures = {"by": "rows", "sources": {"a": {"share_asked": 0.5, "share_realised": 0.498}, "b": {"rows": 3}}}
        return Decision(ones, ones * 0, (), figures=figures)


def chats(path: Path, count: int) -> str:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i % 90} | <b>?"},
                {"role": "assistant", "content": f"`{i}`."},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]), "utf-8")
    return str(path)


def spec(folder: Path) -> BuildSpec:
    sources = (
        DataSource(path=chats(folder / "a.jsonl", 100), weight=1.5),
        DataSource(path=chats(folder / "b.jsonl", 40)),
    )
    return BuildSpec(sources, (Sift(share=0.2), ExactDedup(), Figured()), seed=3)


def test_a_build_writes_the_card_that_is_made_of_it(tmp_path: Path) -> None:
    out = build(spec(tmp_path), tmp_path / "out").directory
    first = contents(out)
    assert {README, STATS} <= set(first)
    make_card(out, CardWords())
    assert contents(out) == first
    (out / STATS).unlink()  # counted again from the rows: the same
    make_card(out, CardWords())
    assert contents(out) == first


def test_tokens_stand_in_it_where_the_build_has_a_tokenizer(tmp_path: Path) -> None:
    out = build(replace(spec(tmp_path), tokenizer=Letters, tokenizer_digest="x"), tmp_path / "out").directory
    make_card(out, CardWords(title="Counted"))
    text = (out / README).read_text("utf-8")
    assert "| answer tokens |" in text and "# Counted" in text


class Letters:
    """A tokenizer whose tokens are letters."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[str]:
        return list(text)


def test_the_same_build_has_the_same_card(tmp_path: Path) -> None:
    first = build(spec(tmp_path), tmp_path / "one")
    second = build(spec(tmp_path), tmp_path / "two", workers=2)
    words = CardWords(title="Small", license="mit", samples=2)
    for made in (first, second):
        assert [path.name for path in make_card(made.directory, words)] == [README, STATS]
    assert contents(first.directory) == contents(second.directory)
    make_card(first.directory, words)
    assert contents(first.directory) == contents(second.directory)
    assert build(spec(tmp_path), tmp_path / "one").reused  # a card beside the rows changes nothing
    assert str(tmp_path) not in (first.directory / README).read_text("utf-8").replace(
        str(tmp_path / "a.jsonl"), ""
    ).replace(str(tmp_path / "b.jsonl"), "")


def test_the_hub_reads_the_front_matter(tmp_path: Path) -> None:
    made = build(spec(tmp_path), tmp_path / "out")
    make_card(made.directory, CardWords(title='My "set": #1', license="cc-by-4.0"))
    read = DatasetCard.load(made.directory / README).data.to_dict()
    assert read["license"] == "cc-by-4.0" and read["pretty_name"] == 'My "set": #1'
    assert read["size_categories"] == ["n<1K"] and read["task_categories"][0] == "text-generation"
    assert read["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "train.jsonl"}]}]
    assert "language" not in read  # nobody noted one


def test_every_number_of_the_ledger_stands_in_it(tmp_path: Path) -> None:
    made = build(spec(tmp_path), tmp_path / "out")
    make_card(made.directory, CardWords())
    text = (made.directory / README).read_text("utf-8")
    for step in made.ledger["steps"]:
        reasons = [f"{one['count']:,} {reason}" for reason, one in step["left"].items()]
        line = next(line for line in text.splitlines() if line.startswith(f"| {step['name']} |"))
        assert all(reason in line for reason in reasons) and f"| {step['kept']:,} |" in line
    for one in made.manifest["inputs"]:
        assert one["sha256"] in text
    assert made.manifest["output"]["sha256"] in text and "## Rows" not in text
    assert "| a | 0.5 | 0.498 |  |" in text  # figures of a step, as a table
    for title in ("Sources", "Steps", "Duplicates", "Contamination", "Personal data", "Mixture", "Length", "Contents",
                  "Quality", "How it was made"):  # fmt: skip
        assert f"## {title}" in text


def test_languages_are_named_only_where_they_are_known(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Noted(Sift):
        share: float = 0.0
        of: int = 100

        def _one(self, item: Any) -> Any:
            outcome = super()._one(item)
            known = item.record.source.line <= self.of
            code = "en" if item.record.source.line % 2 else "de"
            return replace(outcome, item=outcome.item.noted(language=code)) if known else outcome

    for of, wanted in ((1000, ["de", "en"]), (20, None)):
        made = build(replace(spec(tmp_path), steps=(Noted(of=of),)), tmp_path / f"out{of}")
        make_card(made.directory, CardWords())
        assert DatasetCard.load(made.directory / README).data.to_dict().get("language") == wanted


def test_rows_are_shown_only_when_asked_and_cannot_break_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Code?", "completion": "```\n| x |\n````\n---\n# not a title"}) + "\n")
    made = build(BuildSpec((DataSource(path=str(path)),), ()), tmp_path / "out")
    make_card(made.directory, CardWords(samples=1))
    text = (made.directory / README).read_text("utf-8")
    assert text.count("`````") == 2 and text.index("`````text") < text.index("# not a title") < text.rindex("`````")
    assert inline("a|b\n<c> `d`") == "a\\|b &lt;c> \\`d\\`"
    assert table(("x",), []) == "" and table(("x",), [("a|b",)]).splitlines()[-1] == "| a\\|b |"
    assert plain_figures({"n": 3, "of": {"x": 1}, "all": [1, 2]})[1:] == ["| of |  |\n|---|---|\n| x | 1 |"]


def test_from_the_command_line(tmp_path: Path, capsys: Capture) -> None:
    out = build(spec(tmp_path), tmp_path / "out").directory
    assert main(["data", "card", str(out), "--license", "mit"]) == 0
    assert json.loads((out / STATS).read_text("utf-8"))["quality"]["rows"] > 0
    assert main(["data", "report", str(out)]) == 0
    assert "correctness: 100.00%" in capsys.readouterr().out
    words = tmp_path / "words.txt"
    words.write_text("what is\n", "utf-8")
    assert main(["data", "report", str(out), "--words", str(words), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dimensions"]["safety"]["score"] == 0
    shutil.copy(out / "train.jsonl", tmp_path / "alone.jsonl")
    assert set_report(tmp_path / "alone.jsonl")["rows"] == set_report(out)["rows"]


def test_rows_that_are_not_the_sealed_ones(tmp_path: Path) -> None:
    out = build(spec(tmp_path), tmp_path / "out").directory
    rows = (out / "train.jsonl").read_bytes()
    (out / "train.jsonl").write_bytes(rows[: rows.rindex(b"\n", 0, -1) + 1])
    with pytest.raises(LuthierError) as caught:
        make_card(out, CardWords())
    assert "not those that the manifest seals" in caught.value.line() and caught.value.exit_code == 3
    (out / "manifest.json").unlink()
    with pytest.raises(LuthierError) as caught:
        make_card(out, CardWords())
    assert "no manifest.json" in caught.value.line()


def test_the_hub_library_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    made = build(spec(tmp_path), tmp_path / "out")
    make_card(made.directory, CardWords())
    loaded = datasets.load_dataset(str(made.directory), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"] and loaded["train"].num_rows == made.manifest["output"]["rows"]
