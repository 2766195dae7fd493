"""LLaMA-Factory's dataset_info.json as it is: every entry is read with its columns and tags, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.reading import ALL_KINDS, Stamp
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Judged, Pair, Text
from luthier.data.prepare import Prepared, prepare
from luthier.recipe.recipe import DataSection, DataSource


def read(path: Path, names: str, **fields: Any) -> Prepared:
    section = DataSection(train=(DataSource(path=str(path), dataset=names, **fields),))
    return prepare(section, Stamp(), seed=0, kinds=ALL_KINDS)


def written(folder: Path, entries: dict[str, Any], **files: list[Any]) -> Path:
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(entries))
    return path


def said(chat: Chat) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in chat.messages]


HERE = {
    "identity": ("Chat", 91), "alpaca_en_demo": ("Chat", 999), "alpaca_zh_demo": ("Chat", 1000),
    "glaive_toolcall_en_demo": ("Chat", 300), "dpo_en_demo": ("Pair", 300), "kto_en_demo": ("Judged", 300),
    "wiki_demo": ("Text", 30), "c4_demo": ("Text", 300),
}  # fmt: skip


def test_every_entry_of_the_real_file_is_read_or_refused_by_name(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("raw/llamafactory/dataset_info.json")
    known = json.loads(path.read_text())
    outcomes, refused = {}, {}
    for name in known:
        try:
            prepared = read(path, name)
            kinds = {type(record).__name__ for record in prepared.train_records}
            outcomes[name] = (*kinds, prepared.ledger.total("read"))
        except DataError as error:
            outcomes[name], refused[name] = error.what, (str(error.where), error.remedy)
    assert all(remedy and (name in at or at == known[name].get("hf_hub_url")) for name, (at, remedy) in refused.items())
    assert {name: outcomes[name] for name in HERE} == HERE
    others = {name: what for name, what in outcomes.items() if name not in HERE}
    media = [name for name, entry in known.items() if {"images", "videos", "audios"} & entry.get("columns", {}).keys()]
    assert all("only text is trained on" in str(others[name]) for name in media) and len(media) == 13
    absent = {name for name, entry in known.items() if "file_name" in entry and name not in {*HERE, *media}}
    assert {name for name, what in others.items() if what == "no such file"} == absent
    rest = {name: str(what) for name, what in others.items() if name not in media and name not in absent}
    assert all("HF_HUB_OFFLINE" in what or "another hub" in what or "a folder" in what for what in rest.values())


def test_alpaca_reads_only_the_columns_that_are_named(tmp_path: Path) -> None:
    row = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["u", "v"]]}
    path = written(tmp_path, {
        "plain": {"file_name": "a.json"},
        "named": {"file_name": "a.json", "columns": {"system": "system", "history": "history"}},
        "others": {"file_name": "b.json", "columns": {"prompt": "q", "query": "more",
                   "response": "a", "system": "sys"}},
        "texts": {"file_name": "c.json", "columns": {"prompt": "doc"}},
    }, a=[row], b=[{"q": "i", "more": "", "a": "o", "sys": "s", "instruction": "no"}],
        c=[{"doc": "t", "output_": ""}])  # fmt: skip
    prepared = read(path, "plain, named,others")
    plain, named, others = prepared.train_records
    assert said(plain) == [("user", "i\nx"), ("assistant", "o")]
    assert said(named) == [("system", "s"), ("user", "u"), ("assistant", "v"), ("user", "i\nx"), ("assistant", "o")]
    assert said(others) == [("system", "s"), ("user", "i"), ("assistant", "o")]
    assert len(prepared.ledger.notes) == 3 and "`others` is read as alpaca" in prepared.ledger.notes[2]
    assert [type(record) for record in read(path, "texts").train_records] == [Text]


def test_tags_roles_ranking_and_kto(tmp_path: Path) -> None:
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A", "system_tag": "S",
            "observation_tag": "O", "function_tag": "F"}  # fmt: skip
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    turns = [{"who": "S", "says": "s"}, {"who": "U", "says": "q"}, {"who": "F", "says": call},
             {"who": "O", "says": "r"}, {"who": "A", "says": "a"}]  # fmt: skip
    one, other = {"who": "A", "says": "good"}, {"who": "A", "says": "bad"}
    path = written(tmp_path, {
        "chat": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags},
        "pairs": {"file_name": "b.json", "formatting": "sharegpt", "ranking": True, "columns": {"messages": "talk"},
                  "tags": tags},
        "judged": {"file_name": "c.json", "formatting": "sharegpt", "columns": {"messages": "talk", "kto_tag": "ok"},
                   "tags": tags},
        "ranked": {"file_name": "d.json", "ranking": True, "columns": {"chosen": "yes", "rejected": "no"}},
        "openai": {"file_name": "e.json", "formatting": "openai", "columns": {"messages": "messages"}},
    }, a=[{"talk": turns}], b=[{"talk": turns[:2], "chosen": one, "rejected": other}],
        c=[{"talk": turns, "ok": False}], d=[{"instruction": "q", "input": "", "yes": "good", "no": "bad"}],
        e=[{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])  # fmt: skip
    chat, pair, judged, ranked, openai = read(path, "chat,pairs,judged,ranked,openai").train_records
    assert said(chat) == [("system", "s"), ("user", "q"), ("assistant", ""), ("tool", "r"), ("assistant", "a")]
    assert chat.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert isinstance(pair, Pair) and said(pair.rejected) == [("system", "s"), ("user", "q"), ("assistant", "bad")]
    assert isinstance(judged, Judged) and judged.desirable is False and said(judged.answer) == said(chat)
    assert isinstance(ranked, Pair) and said(ranked.chosen) == [("user", "q"), ("assistant", "good")]
    assert said(openai) == [("user", "q"), ("assistant", "a")]


def test_num_samples_takes_rows_and_counts_the_others(tmp_path: Path) -> None:
    rows = [{"instruction": f"i{n}", "output": "o"} for n in range(40)]
    path = written(
        tmp_path, {"few": {"file_name": "a.json", "num_samples": 10}, "all": {"file_name": "a.json"}}, a=rows
    )
    prepared = read(path, "few")
    assert prepared.ledger.total("kept") == 10 and prepared.ledger.reasons == {"left out by max_rows 10": 30}
    lines = [record.source.line for record in prepared.train_records]
    assert lines == [record.source.line for record in read(path, "few").train_records]
    assert read(path, "few", max_rows=4).ledger.total("kept") == 4
    assert read(path, "all").fingerprint != prepared.fingerprint


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"file_name": "a.json", "colums": {}}, r"unknown key .*:x\.colums .*did you mean columns"),
        ({"file_name": "a.json", "columns": {"promt": "q"}}, r"columns\.promt .*did you mean prompt"),
        ({"file_name": "a.json", "columns": {"prompt": "qestion"}}, "no row has the column .*did you mean question"),
        ({"file_name": "a.json", "formatting": "chatml"}, "unknown formatting"),
        ({"file_name": "a.json", "num_samples": 0}, "not a number of rows"),
        ({"file_name": "none.json"}, r"no such file .*:x\.file_name"),
        ({"script_url": "x.py"}, "never run"),
        ({"ms_hub_url": "a/b"}, "another hub"),
        ({"hf_hub_url": "a/b"}, "HF_HUB_OFFLINE"),
        ({"hf_hub_url": "wiki_qa"}, "HF_HUB_OFFLINE"),
        ({"file_name": "a.json", "columns": {"images": "images"}}, "only text is trained on"),
        ([], "not an object"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, entry: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = written(tmp_path, {"x": entry}, a=[{"question": "q", "output": "o"}])
    with pytest.raises(DataError, match=says):
        read(path, "x")


def test_names_that_are_not_there(tmp_path: Path) -> None:
    path = written(tmp_path, {"alpaca": {"file_name": "a.json"}}, a=[])
    with pytest.raises(DataError, match="nearest: alpaca"):
        read(path, "alpca")
    with pytest.raises(DataError, match="which of its data sets"):
        prepare(DataSection(train=(DataSource(path=str(path)),)), Stamp(), seed=0)
    path.write_text("[1]")
    with pytest.raises(DataError, match="not a list of data sets"):
        read(path, "a")
    path.write_text('{"a": {')
    with pytest.raises(DataError, match="broken JSON"):
        read(path, "a")
