"""The same rows from every container: identical records, samples, ids and order; directories that datasets saved."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
import zstandard

from data.reading import ALL_KINDS, read_file
from luthier.contracts.errors import DataError
from luthier.data.encode import Encoder
from luthier.data.identity import samples_fingerprint
from luthier.data.paths import expand
from luthier.data.prepare import prepare
from luthier.data.source import read_rows
from luthier.data.standard import row_of
from luthier.data.template import open_template
from luthier.recipe.recipe import DataSection, DataSource
from tiny import CHATML, tiny_tokenizer

CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Köln"}}}
OTHER = {"type": "function", "function": {"name": "g", "arguments": {"n": 2, "deep": {"a": [1, 2]}}}}


def _chat(n: int) -> dict[str, Any]:
    """Rows of unequal fields: a table has to fill them with nulls."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"q{n} \u2028 ü\n"}]
    if n % 2:
        messages += [{"role": "assistant", "content": "", "tool_calls": [CALL if n % 3 else OTHER]},
                     {"role": "tool", "content": "{}", "name": "f"}]  # fmt: skip
    messages.append({"role": "assistant", "content": f'a{n}, "said"'} | ({"weight": 1} if n % 5 == 0 else {}))
    return {"messages": messages} | ({"tools": [{"type": "function", "function": {"name": "f"}}]} if n % 2 else {})


SETS: dict[str, list[dict[str, Any]]] = {
    "chats": [_chat(n) for n in range(20)],
    "completions": [{"prompt": f"p{n},\n", "completion": f' c"{n}"\u0085'} for n in range(20)],
    "pairs": [{"prompt": f"p{n}", "chosen": "yes", "rejected": "no", "margin": n / 4} for n in range(20)],
    "judged": [{"prompt": f"p{n}", "completion": "c", "label": n % 3 == 0} for n in range(20)],
    "tokens": [{"input_ids": [n, n + 1, 5], "labels": [-100, n + 1, 5]} for n in range(20)],
    "segments": [{"segments": [{"label": False, "text": "a"}, {"label": True, "text": f"b{n}"}]} for n in range(20)],
    "texts": [{"text": f"text {n}\n\n\nmore"} for n in range(20)],
}


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _csv(path: Path, rows: list[dict[str, Any]], delimiter: str) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(names)
        for row in rows:
            values = [row.get(name, "") for name in names]
            writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in values])


def _padded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    name = path.name
    table = pa.Table.from_pylist(_padded(rows))
    if name.endswith((".csv", ".tsv")):
        _csv(path, rows, "," if name.endswith("csv") else "\t")
    elif name.endswith(".parquet"):
        parquet.write_table(table, path, row_group_size=7)
    elif name.endswith(".feather"):
        feather.write_feather(table, path)
    elif name.endswith(".arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        data = json.dumps(rows, indent=1).encode() if ".json." in name or name.endswith(".json") else _lines(rows)
        pack = gzip.compress if name.endswith(".gz") else zstandard.compress if name.endswith(".zst") else bytes
        path.write_bytes(pack(data))


NAMES = ["a.jsonl", "a.json", "a.parquet", "a.csv", "a.tsv", "a.arrow", "a.feather", "a.jsonl.gz", "a.jsonl.zst",
         "a.json.gz"]  # fmt: skip


def samples_of(path: Path | str, split: str | None = None) -> str:
    section = DataSection(train=(DataSource(path=str(path), split=split),), max_tokens=4096)
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, open_template(CHATML, tokenizer), section)
    return samples_fingerprint(prepare(section, encoder, seed=0, kinds=ALL_KINDS).train)


@pytest.mark.parametrize("kind", SETS)
def test_every_container_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    wanted = None
    for name in NAMES:
        write(tmp_path / name, SETS[kind])
        rows = [row_of(record) for record in read_file(tmp_path / name).train_records]
        wanted = rows if wanted is None else wanted
        assert rows == wanted and len(rows) == 20, name


@pytest.mark.parametrize("kind", ["completions", "pairs", "judged", "tokens", "segments", "texts"])
def test_every_container_gives_the_same_samples_in_the_same_order(tmp_path: Path, kind: str) -> None:
    found = set()
    for name in NAMES:
        write(tmp_path / name, SETS[kind])
        found.add(samples_of(tmp_path / name))
    assert len(found) == 1
    write(tmp_path / "b.jsonl", SETS[kind][::-1])
    assert samples_of(tmp_path / "b.jsonl") not in found


def test_chats_give_the_same_samples(tmp_path: Path) -> None:
    rows = [row for row in SETS["chats"] if len(row["messages"]) == 2]
    found = set()
    for name in NAMES:
        write(tmp_path / name, rows)
        found.add(samples_of(tmp_path / name))
    assert len(found) == 1


def test_a_large_batch_and_texts_with_nul_are_read_by_rows(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}"} for n in range(3000)]
    rows[2500]["text"] = "a\0b"
    feather.write_feather(pa.Table.from_pylist(rows), tmp_path / "a.feather", chunksize=1 << 20)
    prepared = read_file(tmp_path / "a.feather", bad_rows="quarantine")
    assert prepared.ledger.total("kept") == 2999
    assert [reject["source"] for reject in prepared.ledger.rejects] == [f"{tmp_path / 'a.feather'}:2501"]


def test_directories_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = SETS["completions"]
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict({"train": one, "test": one.select(range(5))}).save_to_disk(str(tmp_path / "several"))
    write(tmp_path / "a.jsonl", rows)
    assert samples_of(tmp_path / "one") == samples_of(tmp_path / "several", "train") == samples_of(tmp_path / "a.jsonl")
    assert [Path(path).name for path in expand(str(tmp_path / "one"))] == [
        f"data-0000{n}-of-00003.arrow" for n in range(3)
    ]
    with pytest.raises(DataError, match=r"several splits .* train, test"):
        expand(str(tmp_path / "several"))
    with pytest.raises(DataError, match="one of train, test"):
        expand(str(tmp_path / "several"), "dev")
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"lacks a file .*data-00001-of-00003\.arrow"):
        expand(str(tmp_path / "one"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        expand(str(tmp_path / "one"))


def test_what_describes_a_directory_is_not_read_as_rows(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json", "data-1.jsonl", "readings.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}')
    assert [Path(path).name for path in expand(str(tmp_path))] == ["data-1.jsonl", "readings.jsonl"]


def test_a_hub_id_is_refused_offline_in_every_spelling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for path in ("org/name", "hub:org/name", "hub:wiki_qa"):
        with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set .*give a local file"):
            list(read_rows(expand(path)[0], lambda error, _: None))


def test_rows_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Split and configuration are passed on; objects lose the nulls that their columns gave them."""
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([_chat(1), _chat(2)])

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows("hub:org/name", lambda error, _: None, split="test", subset="en"))
    assert asked == [("org/name", "en", "test")] and [str(source) for _, source in rows] == [
        "org/name[test]:1", "org/name[test]:2",
    ]  # fmt: skip
    assert rows[1][0]["messages"] == _chat(2)["messages"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match=r"the hub did not give the data set \(ZeroDivisionError"):
        list(read_rows("hub:org/name", lambda error, _: None))
