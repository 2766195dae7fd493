"""Sources with columns, parts and peers' descriptions: the same rows in a build and in a run, whatever the workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.reading import ALL_KINDS, Stamp
from luthier.data.build import BuildSpec, build
from luthier.data.prepare import prepare
from luthier.recipe.recipe import DataSection, DataSource


def written(folder: Path) -> tuple[DataSource, ...]:
    for part in range(3):
        rows = [
            {"talk": [{"from": "human", "value": f"q{part}.{n}"}, {"from": "gpt", "value": "a"}]} for n in range(40)
        ]
        (folder / f"part-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.json").write_text(json.dumps([{"q": f"{n}", "output": "o"} for n in range(9)]))
    entry = {"file_name": "a.json", "columns": {"prompt": "q"}, "num_samples": 5}
    (folder / "dataset_info.json").write_text(json.dumps({"asked": entry}))
    return (
        DataSource(path=str(folder / "part-*.jsonl"), columns={"conversations": "talk"}, max_rows=30, name="talks"),
        DataSource(path=str(folder / "part-*.jsonl"), columns={"conversations": "talk"}, shard="2/3"),
        DataSource(path=str(folder / "dataset_info.json"), dataset="asked"),
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_reads_what_a_run_reads(tmp_path: Path, workers: int) -> None:
    sources = written(tmp_path)
    made = build(BuildSpec(sources, (), seed=5), tmp_path / "out", workers)
    rows: list[dict[str, Any]] = [json.loads(line) for line in made.rows.read_text("utf-8").splitlines()]
    run = prepare(DataSection(train=sources), Stamp(), seed=5, kinds=ALL_KINDS)
    places = [f"{row['luthier']['file']}:{row['luthier']['line']}" for row in rows]
    assert sorted(places) == sorted(str(record.source) for record in run.train_records)
    assert sum(row["luthier"]["origin"] == "talks" for row in rows) == 30
    assert sum(row["luthier"]["origin"] == "asked" for row in rows) == 5
    assert run.ledger.total("read") == 120 + 120 + 9
    run.ledger.assert_balanced()
