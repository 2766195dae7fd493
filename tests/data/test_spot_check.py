"""The spot-check: samples that add up, sheets that no program runs, verdicts counted right or refused."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.cli.main import main
from luthier.contracts.errors import LuthierError, UsageError
from luthier.contracts.record import Chat, Completion, Judged, Pair, Source, Text
from luthier.contracts.step import Item
from luthier.data import built
from luthier.data.built_set import Row, built_rows, row_digest
from luthier.data.check_sheet import LONGEST, cell, judged, page, sheet
from luthier.data.spot_check import SamplePlan, allotted, picked, shown
from luthier.data.verdicts import Count, Verdicts, effective_size, finite, wilson

Capture = pytest.CaptureFixture[str]
AT = Source("rows.jsonl", 1)
NASTY = [
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2",
    "@SUM(A1)",
    "\tx",
    "＝1",
    'say "hi", ok\r\nnow',
    "</script><img src=x>",
    "\0",
    "",
]


def items(count: int) -> list[Item]:
    return [
        Item(Completion(f"Question {i}?", f"Answer {i}.", Source("rows.jsonl", i + 1)), "many" if i % 20 else "few",
             {"language": "en" if i % 3 else "zh", "judge": 1.5 + i % 4})
        for i in range(count)
    ]  # fmt: skip


def write(folder: Path, rows: list[Item]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_bytes(b"".join(map(built.line, rows)))
    return folder


def rows_of(rows: list[Item]) -> list[Row]:
    return [Row(at, row_digest(built.line(item)), item) for at, item in enumerate(rows, 1)]


# ----------------------------------------------------------------------------------------------- sample


@given(st.dictionaries(st.tuples(st.sampled_from("abcdefgh")), st.integers(1, 50), max_size=8), st.integers(0, 300))
def test_quotas_add_up(rows: dict[tuple[str, ...], int], size: int) -> None:
    made, total = allotted(rows, size), sum(rows.values())
    assert sum(made.values()) == min(size, total)
    assert all(0 <= made[name] <= rows[name] for name in rows)
    if size >= len(rows):
        assert all(made.values())
    if size >= total:
        assert made == rows


def test_quotas_are_proportional() -> None:
    assert allotted({("a",): 900, ("b",): 90, ("c",): 10}, 100) == {("a",): 90, ("b",): 9, ("c",): 1}
    assert allotted({("a",): 996, ("b",): 2, ("c",): 2}, 10) == {("a",): 8, ("b",): 1, ("c",): 1}
    assert sum(allotted({("a",): 5, ("b",): 5, ("c",): 5}, 2).values()) == 2


def test_a_sample_comes_again_and_holds_its_strata() -> None:
    rows = rows_of(items(400))
    plan = SamplePlan(share=0.1, by=("origin", "language"))
    chosen, strata = picked(lambda: iter(rows), plan)
    again, _ = picked(lambda: iter(rows), plan)
    other, _ = picked(lambda: iter(rows), SamplePlan(share=0.1, by=("origin", "language"), seed=1))
    assert chosen == again and len(chosen) == 40 == len({row.line for row in chosen})
    assert {row.line for row in other} != {row.line for row in chosen}
    seen = Counter((row.item.origin, str(row.item.notes["language"])) for row in chosen)
    assert dict(seen) == dict(allotted(strata.rows, 40))
    assert [row.line for row in chosen] != sorted(row.line for row in chosen)  # its beginning is a sample as well


def test_every_row_is_as_likely() -> None:
    rows = rows_of(items(50))
    hits = Counter(
        row.line for seed in range(400) for row in picked(lambda: iter(rows), SamplePlan(rows=10, by=(), seed=seed))[0]
    )
    expected, spread = 80, math.sqrt(400 * 0.2 * 0.8)
    assert all(abs(hits[line] - expected) < 4.5 * spread for line in range(1, 51))


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.5}, {"rows": 0}])
def test_sizes_that_mean_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SamplePlan(**wrong)


def test_rows_as_people_read_them() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    chat = Chat([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Weather?"},
                 {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "Ask."}], AT,
                )  # fmt: skip
    asked, said = shown(chat)
    assert asked == "[system]\nBe kind.\n\n[user]\nWeather?"
    assert said == '[reasoning]\nAsk.\n[call] {"name": "weather", "arguments": {"city": "Oslo"}}'
    assert shown(Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}], AT)) == ("Hi", "Yo")
    pair = Pair(Completion("q", "good", AT), Completion("q", "bad", AT), AT)
    assert shown(pair) == ("q", "[chosen]\ngood\n\n[rejected]\nbad")
    assert shown(Judged(Completion("q", "a", AT), False, AT)) == ("q", "[undesirable]\na")
    assert shown(Text("words", AT)) == ("", "words")


# ------------------------------------------------------------------------------------------------ sheet


@given(st.lists(st.sampled_from(NASTY) | st.text(max_size=20), min_size=2, max_size=6))
def test_cells_come_back_and_none_is_a_formula(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    rows = rows_of([Item(Completion(text, texts[0], AT), "o") for text in texts])
    read = list(csv.reader(io.StringIO(sheet(rows), newline="")))
    assert len(read) == len(rows) + 1 and all(len(fields) == 8 for fields in read)
    for fields, text in zip(read[1:], texts, strict=True):
        assert fields[3] in (text.replace("\0", "\ufffd"), "'" + text.replace("\0", "\ufffd"))
        assert not any(
            field.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")) for field in fields
        )


def test_long_cells_are_cut() -> None:
    assert len(cell("x" * 40_000)) == LONGEST and cell("x" * 40_000).endswith("[cut here]")
    assert cell("x" * LONGEST) == "x" * LONGEST


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs), attrs
        if tag == "pre":
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts and self.lasttag == "pre":
            self.texts[-1] += data


def test_the_page_holds_every_text_and_runs_only_its_own_script() -> None:
    rows = rows_of([Item(Completion(text, "{{title}} <b>&amp;", AT), "<o>") for text in NASTY])
    made = page(rows, "A <check>")
    read = _Page()
    read.feed(made)
    assert read.tags["article"] == len(NASTY) and read.tags["script"] == read.tags["style"] == 1
    assert not read.tags["img"] and not read.tags["b"] and not read.tags["link"]
    assert [text.partition("\n")[0] for text in read.texts[1::2]] == ["{{title}} <b>&amp;"] * len(NASTY)
    assert html.escape("</script><img src=x>") in made and "<title>A &lt;check&gt;</title>" in made
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', made)
    assert policy and "default-src 'none'" in policy.group(1) and policy.group(1).count("sha256-") == 2
    assert "{{" not in made.replace("{{title}} ", "")


_HARNESS = """
const fs = require("fs");
const page = fs.readFileSync(process.argv[1], "utf-8");
const script = page.split("<script>")[1].split("</script>")[0];
const heard = {};
function element(data) {
  const inputs = ["good", "bad", "unsure"].map((value) => ({ value, checked: false }));
  const classList = { contains: (name) => name === "comment" };
  const comment = { value: "", classList, addEventListener() {}, focus() {} };
  return { dataset: data, className: "", focus() {}, scrollIntoView() {}, addEventListener() {},
    querySelectorAll: () => inputs, querySelector: () => comment, inputs };
}
const shape = /data-file="([^"]*)" data-line="([^"]*)" data-origin="([^"]*)" data-id="([^"]*)"/g;
const data = [...page.matchAll(shape)];
const articles = data.map(([, file, line, origin, id]) => element({ file, line, origin, id }));
globalThis.localStorage = { getItem: () => null, setItem() {} };
globalThis.document = {
  querySelectorAll: () => articles, getElementById: () => ({ addEventListener() {} }),
  addEventListener: (name, work) => { heard[name] = work; }, createElement: () => ({ click() {} }),
};
const run = new Function(script + "; return csv;");
const csv = run();
for (const key of process.argv[2]) heard.keydown({ key, target: {}, preventDefault() {} });
process.stdout.write(csv());
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not here to run the page's script")
def test_keys_judge_and_the_saved_sheet_reads_back(tmp_path: Path) -> None:
    folder = write(tmp_path / "built", items(6))
    rows = list(built_rows(folder))
    (tmp_path / "check.html").write_text(page(rows, "check"), "utf-8")
    (tmp_path / "run.js").write_text(_HARNESS, "utf-8")
    made = subprocess.run(["node", "-e", _HARNESS, str(tmp_path / "check.html"), "g5ku4jbx1"], capture_output=True,
                          check=True, timeout=240, text=True)  # fmt: skip
    (tmp_path / "check.csv").write_text(made.stdout, "utf-8")
    found = judged(built_rows(folder), ("origin",), tmp_path / "check.csv")
    assert {one.line: one.word for one in found.checked} == {1: "good", 2: "unsure", 3: "4", 5: "bad", 6: "1"}
    assert found.not_judged == 1


# --------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(("good", "n"), [(0, 5), (5, 5), (1, 1), (93, 100), (47, 50), (500, 1000)])
def test_wilson_as_scipy(good: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.binomtest(good, n).proportion_ci(0.95, "wilson")
    assert wilson(good / n, n) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_intervals_at_their_limits() -> None:
    assert wilson(0.3, math.inf) == (0.3, 0.3)
    assert wilson(1.0, 10)[1] == 1.0 and wilson(0.0, 10)[0] == 0.0
    assert finite(50, 50, 50) == math.inf and finite(50, 50, 10**9) == pytest.approx(50)
    assert effective_size([(900, 90), (100, 10)]) == pytest.approx(100)
    assert effective_size([(900, 50), (100, 50)]) < 100


def test_strata_count_by_their_rows() -> None:
    """90 % of the set is good in 9 of 10, the rest in 1 of 10: 0.82, however unevenly it was sampled."""
    counts = {("a",): Count(900, good=9, bad=1), ("b",): Count(100, good=1, bad=9, unsure=2), ("c",): Count(7)}
    made = Verdicts(("origin",), counts).to_json()
    assert made["share"] == pytest.approx(0.82)
    assert made["if_unsure_is_bad"] == pytest.approx(0.9 * 0.9 + 0.1 / 12, abs=1e-6)
    assert made["rows_of_strata_without_verdicts"] == 7
    assert made["effective_sample"] == pytest.approx(1000**2 / (900**2 / 10 + 100**2 / 10), abs=0.01)
    low, high = made["interval"]
    assert low < made["interval_finite"][0] < 0.82 < made["interval_finite"][1] < high


def filled(folder: Path, path: Path, verdict: Callable[[int], str], **plan: Any) -> Path:
    chosen, _ = picked(partial(built_rows, folder), SamplePlan(**plan))
    read = list(csv.DictReader(io.StringIO(sheet(chosen), newline="")))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(read[0]))
        writer.writeheader()
        writer.writerows({**row, "verdict": verdict(at)} for at, row in enumerate(read))
    return path


def test_verdicts_from_the_command_line(tmp_path: Path, capsys: Capture) -> None:
    folder, out = write(tmp_path / "built", items(200)), tmp_path / "check.csv"
    assert (
        main(["data", "sample", str(folder), "--out", str(out), "--html", str(tmp_path / "c.html"), "--share", "0.2"])
        == 0
    )
    assert "40 of 200 rows" in capsys.readouterr().out
    drawn = out.read_bytes()
    assert drawn.count(b"\r\n") == 41 and drawn.startswith(b'"file","line"')
    check = filled(
        folder, tmp_path / "done.csv", lambda at: ["good", "GOOD ", "5", "4", "bad", "3", ""][at % 7], share=0.2
    )
    assert main(["data", "verdicts", str(folder), str(check), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["judged"], made["unsure"], made["not_judged"]) == (30, 5, 5)
    assert 0.6 < made["share"] < 1 and made["interval"][0] < made["share"] < made["interval"][1]
    assert main(["data", "verdicts", str(folder), str(check), "--accept", "0.99"]) == 3
    said = capsys.readouterr()
    assert "too few rows are good" in said.err and "origin few" in said.out
    assert main(["data", "verdicts", str(folder), str(check), "--accept", "0.5"]) == 0


def test_the_judge_stands_beside_the_people(tmp_path: Path, capsys: Capture) -> None:
    """The judge's marks are 1.5, 2.5, 3.5, 4.5 in turn: good from 4. People call the first good as well."""
    folder = write(tmp_path / "built", items(40))
    marks = {f"Question {i}?": 1.5 + i % 4 for i in range(40)}
    check = filled(folder, tmp_path / "check.csv", lambda at: "", share=1.0)
    rows = list(csv.DictReader(io.StringIO(check.read_text("utf-8"), newline="")))
    with check.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "verdict": "good" if marks[row["prompt"]] in (1.5, 4.5) else "bad"})
    assert main(["data", "verdicts", str(folder), str(check), "--json"]) == 0
    beside = json.loads(capsys.readouterr().out)["judge"]
    assert (beside["rows"], beside["agreed"]) == (40, 30)
    assert beside["kappa"] == pytest.approx((0.75 - 0.5) / 0.5)
    assert main(["data", "verdicts", str(folder), str(check)]) == 0
    assert "agree on 30 of 40 rows, Cohen's kappa 0.50" in capsys.readouterr().out


def test_sheets_as_spreadsheets_save_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "built", items(30))
    check = filled(folder, tmp_path / "a.csv", lambda at: "good", rows=10)
    wanted = judged(built_rows(folder), ("origin",), check).to_json()
    rows = list(csv.reader(io.StringIO(check.read_text("utf-8"), newline="")))
    for name, separator, encoding in (("b", ";", "utf-8-sig"), ("c", "\t", "utf-16"), ("d", ",", "utf-8")):
        with (tmp_path / f"{name}.csv").open("w", encoding=encoding, newline="") as file:
            csv.writer(file, delimiter=separator, lineterminator="\n").writerows(rows)
        assert judged(built_rows(folder), ("origin",), tmp_path / f"{name}.csv").to_json() == wanted


@pytest.mark.parametrize(
    ("change", "what"),
    [(lambda text: text.replace("good", "fine", 1), "check.csv:2 — saw fine"),
     (lambda text: text.replace("-", "-0", 1), "not the id of a row — "),
     (lambda text: text.replace("verdict", "opinion", 1), "no column verdict"),
     (lambda text: text + text.partition("\n")[2], "judged twice"),
     (lambda text: text.replace('"', "", 1) + '"', "not a CSV sheet"),
     (lambda text: "", "an empty sheet")],
)  # fmt: skip
def test_sheets_that_are_wrong(change: Callable[[str], str], what: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "built", [Item(Completion("q", "a\nb", AT), "o"), Item(Completion("r", "c", AT), "o")])
    check = filled(folder, tmp_path / "check.csv", lambda at: "good", share=1.0)
    check.write_text(change(check.read_text("utf-8")), "utf-8", newline="")
    with pytest.raises(LuthierError) as caught:
        judged(built_rows(folder), ("origin",), check)
    assert what in caught.value.line() and caught.value.exit_code == 3


def test_verdicts_of_another_build_are_refused_by_line(tmp_path: Path) -> None:
    folder, other = write(tmp_path / "a", items(30)), write(tmp_path / "b", items(10)[::-1])
    check = filled(folder, tmp_path / "check.csv", lambda at: "good", rows=12)
    with pytest.raises(LuthierError) as caught:
        judged(built_rows(other), ("origin",), check)
    lines = caught.value.line().splitlines()
    assert len(lines) >= 10 and all("does not belong to this built set" in line for line in lines)
    assert "check.csv:2" in lines[0]


def test_what_is_no_built_set(tmp_path: Path, capsys: Capture) -> None:
    assert main(["data", "sample", str(tmp_path), "--out", "x.csv"]) == 2
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    assert main(["data", "sample", str(tmp_path), "--out", str(tmp_path / "x.csv")]) == 3
    assert "train.jsonl:1" in capsys.readouterr().err
    assert main(["data", "sample", str(write(tmp_path / "b", items(3)))]) == 2
