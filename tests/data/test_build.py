"""A build: the same bytes on one process or two, after a kill at any point, and counts that add up to the last row."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.build_rig import Share, Sift, code_of, contents, faulty_build, spec_of, write_rows
from luthier.contracts.errors import DataError, LuthierError, ResourceError
from luthier.contracts.record import Source, Text
from luthier.contracts.step import Item, Room, Step
from luthier.data import passes, stage
from luthier.data.applied import apply, name_of, read
from luthier.data.build import BuildSpec, build
from luthier.data.steps.exact_dedup import ExactDedup
from luthier.recipe.recipe import DataSource

STEPS = st.one_of(
    st.builds(Sift, salt=st.integers(0, 9), share=st.floats(0, 1)),
    st.builds(Share, salt=st.integers(0, 9), most=st.integers(0, 3), more=st.integers(0, 4)),
    st.builds(ExactDedup, of=st.sampled_from(["row", "prompt"])),
)


@given(st.lists(STEPS, max_size=5), st.integers(0, 40))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_came_in_is_accounted_for(steps: list[Step], rows: int) -> None:
    items = [Item(Text(f"row {i % 13}", Source("rows.jsonl", i + 1)), "rows") for i in range(rows)]
    kept, tallies = apply(steps, items, Room(Path("unused")))
    there = rows
    for step, tally in zip(steps, tallies, strict=True):
        assert tally.name == name_of(step) and tally.read == there
        assert tally.read + sum(tally.added.values()) == tally.kept + sum(one.count for one in tally.left.values())
        there = tally.kept
    assert len(kept) == there


@pytest.mark.parametrize("part_rows", [1, 50, 8192])
def test_on_disk_as_in_memory(part_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PART_ROWS", part_rows)
    spec = replace(spec_of(tmp_path, rows=60), sources=tuple(s.model_copy(update={"weight": 1.0}) for s in
                                                             write_rows(tmp_path, 3, 60)))  # fmt: skip
    made = build(spec, tmp_path / "out")
    items = [Item(record, f"rows{at}") for at in range(3) for record in read(spec.sources[at].path)]
    kept, tallies = apply(spec.steps, items, Room(tmp_path / "cache", seed=7))
    lines = made.rows.read_bytes().splitlines(keepends=True)
    assert lines == [stage.built.line(item) for item in kept]
    assert [one["kept"] for one in made.ledger["steps"]] == [tally.kept for tally in tallies]
    assert [one["left"] for one in made.ledger["steps"]] == [tally.to_json()["left"] for tally in tallies]


def test_one_process_or_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(tmp_path)
    one = build(spec, tmp_path / "one", workers=1)
    two = build(spec, tmp_path / "two", workers=2)
    assert contents(one.directory) == contents(two.directory)
    assert one.manifest["output"]["rows"] == len(one.rows.read_bytes().splitlines()) > 0
    assert not (tmp_path / "one" / ".work" / "stages").exists()


POINTS = ["stage.write:1", "stage.write:700", "stage.write:2500", "stage.before_sidecar:2", "stage.before_sidecar:9",
          "durable.write:3", "durable.write:11", "durable.write:20", "finish.before_manifest:1"]  # fmt: skip


def test_killed_anywhere(tmp_path: Path) -> None:
    whole = build(spec_of(tmp_path), tmp_path / "whole")
    out = tmp_path / "out"
    for point in POINTS[::2]:  # one after another in the same directory: each goes on from what the one before left
        assert _run(tmp_path, out, fault=point) in (-signal.SIGKILL, 0), point
        if not (out / "manifest.json").exists():
            assert not _usable(out)
    assert _run(tmp_path, out) == 0
    assert contents(out) == contents(whole.directory)


def test_each_kill_alone(tmp_path: Path) -> None:
    whole = build(spec_of(tmp_path), tmp_path / "whole")
    for at, point in enumerate(POINTS[1::3]):
        out = tmp_path / f"out{at}"
        assert _run(tmp_path, out, fault=point) == -signal.SIGKILL, point
        assert not (out / "manifest.json").exists()
        build(spec_of(tmp_path), out)
        assert contents(out) == contents(whole.directory)


def test_a_dead_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_FAULT", "stage.write:5")  # in the members: the first process writes no part of a file
    with pytest.raises(ResourceError) as caught:
        build(spec_of(tmp_path), tmp_path / "out", workers=2)
    assert "by signal 9" in caught.value.line()
    monkeypatch.delenv("LUTHIER_FAULT")
    again = build(spec_of(tmp_path), tmp_path / "out", workers=2)
    assert contents(again.directory) == contents(build(spec_of(tmp_path), tmp_path / "whole").directory)


def test_a_built_set_is_taken_only_as_it_is(tmp_path: Path) -> None:
    spec, out = spec_of(tmp_path), tmp_path / "out"
    first = contents(build(spec, out).directory)
    assert build(spec, out).reused
    (out / "train.jsonl").write_bytes(first["train.jsonl"][:-1])
    assert not build(spec, out).reused and contents(out) == first
    assert not build(replace(spec, seed=8), out).reused
    rows = Path(spec.sources[1].path)
    rows.write_text(rows.read_text("utf-8") + '{"text": "one more"}\n', "utf-8")
    assert not build(spec, out).reused


def test_a_changed_part_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, out = spec_of(tmp_path), tmp_path / "out"
    monkeypatch.setenv("LUTHIER_FAULT", "finish.before_manifest:1:EIO")
    with pytest.raises(OSError, match="Input/output"):
        build(spec, out)
    monkeypatch.delenv("LUTHIER_FAULT")
    part = next(path for path in sorted((out / ".work" / "stages").glob("*/f00001-00000.jsonl"))[::-1])
    raw = bytearray(part.read_bytes())
    raw[raw.index(b"row")] ^= 1
    part.write_bytes(bytes(raw))
    with pytest.raises(DataError) as caught:
        build(spec, out)
    assert str(part) in caught.value.line()


def test_wrong_rows_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    sources = write_rows(tmp_path, 2, 5)
    for source in sources:
        path = Path(source.path)
        path.write_text(path.read_text("utf-8") + "{broken\n", "utf-8")
    with pytest.raises(LuthierError) as caught:
        build(BuildSpec(sources, ()), tmp_path / "out", workers=2)
    assert "rows0.jsonl:6" in caught.value.line() and "rows1.jsonl:6" in caught.value.line()
    assert caught.value.exit_code == 3
    made = build(BuildSpec(sources, (), bad_rows="quarantine"), tmp_path / "out")
    assert made.ledger["sources"]["read"] == 12 and made.ledger["sources"]["kept"] == 10
    assert len((tmp_path / "out" / "rejects.jsonl").read_text("utf-8").splitlines()) == 2


def test_nothing_left_says_who_took_it(tmp_path: Path) -> None:
    sources = tuple(DataSource(path=source.path) for source in write_rows(tmp_path, 1, 5))
    with pytest.raises(DataError) as caught:
        build(BuildSpec(sources, (Sift(share=1.0),)), tmp_path / "out")
    assert "0 rows left" in caught.value.line() and "Sift" in caught.value.line()


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(LuthierError) as caught:
        build(spec_of(tmp_path), tmp_path / "out")
    assert "thesis.tex" in caught.value.line() and caught.value.exit_code == 2


def _run(folder: Path, out: Path, fault: str = "") -> int | None:
    return code_of(faulty_build, folder, out, fault)


def _usable(out: Path) -> bool:
    try:
        return bool(json.loads((out / "manifest.json").read_bytes()))
    except FileNotFoundError:
        return False
