"""Sources as Axolotl and LLaMA-Factory write them, read as ours with notes; what has no counterpart is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.contracts.errors import LuthierError
from luthier.recipe.axolotl import NoCounterpart, read_entry
from luthier.recipe.read import read_recipe

TURNS = {"messages": "conversations", "messages.role": "from", "messages.content": "value"}


@pytest.mark.parametrize(
    ("entry", "ours"),
    [
        ({"path": "a.jsonl", "type": "alpaca", "ds_type": "json", "split": "train"}, {"format": "alpaca"}),
        ({"path": "a.jsonl"} | {"type": "sharegpt", "conversation": "chatml"}, {"format": "sharegpt"}),
        ({"path": "o/n", "type": "completion", "field": "doc", "split": "train", "name": "en"},
         {"format": "text", "columns": {"text": "doc"}, "split": "train", "subset": "en"}),
        ({"path": "a.json", "type": "input_output"}, {"format": "segments"}),
        ({"path": "a.json", "type": "pretrain", "text_column": "body"},
         {"format": "text", "columns": {"text": "body"}}),
        ({"path": "a.json", "type": "chat_template", "field_messages": "conversations",
          "message_property_mappings": {"role": "from", "content": "value"}, "chat_template": "tokenizer_default",
          "roles": {"assistant": ["gpt", "bot"], "user": ["human"]}, "roles_to_train": ["assistant", "human"],
          "train_on_eos": "turn"},
         {"format": "messages", "columns": TURNS, "train_roles": ["assistant", "user"],
          "role_names": {"gpt": "assistant", "bot": "assistant", "human": "user"}}),
        ({"path": "a.json", "type": "chat_template", "message_field_role": "from", "message_field_content": "value",
          "message_field_training": "training", "field_messages": "conversations"},
         {"format": "messages", "columns": TURNS | {"messages.train": "training"}}),
        ({"path": "a.json", "type": {"field_instruction": "q", "field_output": "a", "field_system": "sys"}},
         {"format": "alpaca", "columns": {"instruction": "q", "output": "a", "system": "sys"}}),
        ({"path": "a.json", "type": "alpaca_w_system.load_open_orca", "shards": 10, "shards_idx": 2},
         {"format": "query_response", "shard": "3/10",
          "columns": {"query": "question", "response": "response", "system": "system_prompt"}}),
        ({"path": "a.json", "type": "chatml.intel"},
         {"format": "preference",
          "columns": {"query": "question", "response": "chosen", "rejected_response": "rejected"}}),
        ({"path": "a.json", "type": "chat_template.default", "field_chosen": "yes", "field_rejected": "no"},
         {"format": "preference", "columns": {"chosen": "yes", "rejected": "no"}}),
        ({"path": "a.json", "type": "stepwise_supervised", "step_separator": "\n"}, {"format": "stepwise"}),
    ],
)  # fmt: skip
def test_axolotls_entries(entry: dict[str, Any], ours: dict[str, Any]) -> None:
    made, notes = read_entry(entry)
    assert made == [{**ours, "path": entry["path"]}]
    assert notes and entry["path"] in notes[-1]


def test_data_files_become_sources_each() -> None:
    made, _ = read_entry({"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "type": "alpaca", "split": "train"})
    assert [one["path"] for one in made] == ["a.jsonl", "b.jsonl"]
    assert read_entry({"path": "folder", "data_files": "a.jsonl"})[0] == [{"path": "folder/a.jsonl"}]
    assert read_entry({"path": "a.json", "type": "chatml.argilla"}, "kto")[0][0]["format"] == "unpaired"


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"path": "a", "type": "alpaca", "chat_template": "chatml"}, "chat_template"),
        ({"path": "a", "type": {"field_instruction": "q", "format": "[INST] {instruction}"}}, "type"),
        ({"path": "a", "type": "no_such_type"}, "type"),
        ({"path": "a", "type": "chat_template", "train_on_eos": "all"}, "train_on_eos"),
        ({"path": "a", "type": "chat_template", "message_field_training_detail": "x"}, "message_field_training_detail"),
        ({"path": "a", "type": "alpaca", "trust_remote_code": True}, "trust_remote_code"),
        ({"path": "a", "type": "alpaca", "split": "train[:10]"}, "split"),
        ({"path": "a.json", "type": "alpaca", "split": "test"}, "split"),
        ({"path": "a", "type": "alpaca", "shards": 0}, "shards"),
        ({"path": "a", "type": "alpaca", "revision": "abc"}, "revision"),
        ({"path": "a", "type": "alpaca", "fild": "abc"}, "fild"),
        ({"path": "a", "type": "chat_template", "roles": ["gpt"]}, "roles"),
        ({"type": "alpaca"}, "path"),
    ],
)
def test_what_has_no_counterpart_is_named(entry: dict[str, Any], key: str) -> None:
    with pytest.raises(NoCounterpart) as caught:
        read_entry(entry)
    assert caught.value.args[0] == key and caught.value.args[2]


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: some/model\n" + text)
    return path


def test_a_recipe_of_axolotl(tmp_path: Path) -> None:
    path = recipe(tmp_path, """
datasets:
  - path: a.jsonl
    type: chat_template
    field_messages: talk
  - b.jsonl
  - {path: json, data_files: [c.jsonl, d.jsonl], type: alpaca}
""")  # fmt: skip
    read, notes = read_recipe(str(path))
    assert [one.path for one in read.data.train] == ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]
    assert read.data.train[0].columns == {"messages": "talk"} and read.data.train[3].format == "alpaca"
    assert any("recipe.yaml:4:5: `type: chat_template` of a.jsonl is read as" in note for note in notes)
    path = recipe(tmp_path, "pretraining_dataset:\n  - {path: a.jsonl, text_column: body}\n")
    assert read_recipe(str(path))[0].data.train[0].columns == {"text": "body"}


def test_a_refused_key_has_its_place(tmp_path: Path) -> None:
    path = recipe(tmp_path, "datasets:\n  - path: a.jsonl\n    type: alpaca\n    revision: abc\n")
    with pytest.raises(LuthierError, match=r"recipe\.yaml:5:5.*download that revision"):
        read_recipe(str(path))
    path = recipe(tmp_path, "data:\n  train:\n    - {path: a.jsonl, colums: {text: a}}\n")
    with pytest.raises(LuthierError, match=r"did you mean `columns`"):
        read_recipe(str(path))
    path = recipe(tmp_path, "data: {train: {path: a.jsonl, shard: two/ten}}\n")
    with pytest.raises(LuthierError, match="shard"):
        read_recipe(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "dataset: a,b\ndataset_dir: data\nmax_samples: 7\n",
        "data: {dataset: [a, b], dataset_dir: data, max_samples: 7}\n",
        "data: {train: data/dataset_info.json, dataset: 'a,b'}\n",
        "data: {train: [{path: data/dataset_info.json, dataset: 'a,b'}]}\n",
    ],
)
def test_names_of_llama_factory(tmp_path: Path, text: str) -> None:
    (source,) = read_recipe(str(recipe(tmp_path, text)))[0].data.train
    assert (source.path, source.dataset) == ("data/dataset_info.json", "a,b")
    assert source.max_rows == (7 if "max_samples" in text else None)


def test_evaluation_sets_of_llama_factory(tmp_path: Path) -> None:
    read, _ = read_recipe(str(recipe(tmp_path, "dataset: a\neval_dataset: b\ndataset_dir: data\n")))
    assert read.data.train[0].dataset == "a" and read.data.eval[0].dataset == "b"
    assert read_recipe(str(recipe(tmp_path, "dataset: a.json,b.json\n")))[0].data.train[1].path == "b.json"
