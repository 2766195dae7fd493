"""One entry of Axolotl's `datasets` as sources of ours: `type` and the fields beside it become format and columns.

Types that write a text of their own around the columns (alpaca's "Below is an instruction …") become conversations
rendered by the model's chat template; the note says so. Prompt texts of a user's own (`format: "[INST] {instruction}"`)
are refused: rows of prompt and completion say the same without a second template language.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

_OURS = {
    "path", "name", "weight", "format", "split", "subset", "dataset", "columns", "role_names", "train_roles",
    "max_rows", "shard",
}  # fmt: skip
_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".gz", ".zst")
_TYPES: dict[str, tuple[str, dict[str, str | None]]] = {
    "alpaca": ("alpaca", {}),
    "alpaca_chat": ("alpaca", {}),
    "alpaca_w_system": ("alpaca", {}),
    "alpaca_instruct": ("alpaca", {}),
    "alpaca_chat.load_qa": ("query_response", {"query": "question", "response": "answer"}),
    "alpaca_chat.load_camel_ai": ("query_response", {"query": "message_1", "response": "message_2"}),
    "alpaca_w_system.load_open_orca":
        ("query_response", {"query": "question", "response": "response", "system": "system_prompt"}),
    "gpteacher": ("alpaca", {"output": "response"}),
    "oasst": ("alpaca", {"instruction": "INSTRUCTION", "output": "RESPONSE"}),
    "summarizetldr": ("query_response", {"query": "article", "response": "summary"}),
    "sharegpt": ("sharegpt", {}),
    "chat_template": ("messages", {}),
    "messages.chat": ("messages", {}),
    "chat": ("messages", {}),
    "completion": ("text", {}),
    "pretrain": ("text", {}),
    "input_output": ("segments", {}),
    "stepwise_supervised": ("stepwise", {}),
    "bradley_terry.chat_template": ("preference", {}),
    "chat_template.default": ("preference", {}),
    "chat_template.argilla_chat": ("preference", {}),
    "passthrough": ("preference", {}),
}  # fmt: skip
_ASKED = {"argilla": "instruction", "intel": "question", "icr": "input", "prompt_pairs": "prompt"}
_STYLES = ("chatml", "llama3", "zephyr", "mistral")
_TEXT_KEYS = ("format", "no_input_format", "system_prompt", "system_format", "prompt_format", "chosen_format",
              "rejected_format", "completion_format")  # fmt: skip
_REFUSED = {
    "chat_template": "one template for all sources: model.chat_template",
    "chat_template_jinja": "one template for all sources: model.chat_template",
    "message_field_training_detail": "parts of a turn train by rows of segments: format segments",
    "input_transform": "code of a recipe is never run", "input_format": "write it into the rows",
    "logprobs_field": "distillation from stored probabilities is not here", "temperature": "as logprobs_field",
    "revision": "download that revision and give its path", "skip": "take the rows out of the file, or use shard",
    "drop_system_message": "take the system turns out of the rows", "split_thinking": "data.mask.thinking says this",
    "trust_remote_code": "code of a data set is never run",
    "train_on_last_step_only": "no objective here trains on steps yet",
}  # fmt: skip
_DROPPED = {
    "ds_type": "the file's ending says it", "conversation": "the model's chat template is used",
    "preprocess_shards": "nothing depends on it", "template_thinking_key": "the template's own name is used",
    "step_separator": "steps stay apart", "max_completion_length": "data.max_tokens bounds a row",
}  # fmt: skip
_FIELDS = ("field", "text_column", "field_messages", "field_tools", "field_thinking", "field_human", "field_model",
           "field_system", "field_instruction", "field_input", "field_output", "field_prompt", "field_chosen",
           "field_rejected", "field_completion", "field_label", "message_property_mappings", "message_field_role",
           "message_field_content", "message_field_training")  # fmt: skip
_READ = {"type", "data_files", "shards", "shards_idx", "roles", "roles_to_train", "train_on_eos", *_FIELDS}
PEERS = _READ | _REFUSED.keys() | _DROPPED.keys()


class NoCounterpart(Exception):
    """A key of the entry that has no counterpart: its name, the value and the remedy."""


def read_entry(entry: Mapping[str, Any], objective: str = "sft") -> tuple[list[dict[str, Any]], list[str]]:
    """One entry of Axolotl's `datasets` as sources of ours, and the notes."""
    notes: list[str] = []
    for key, value in entry.items():
        if key not in PEERS and key not in _OURS:
            raise NoCounterpart(key, value, f"Axolotl's keys that are read: {', '.join(sorted(_READ))}")
        if key in _REFUSED and value not in (None, False) and not _harmless(key, value):
            raise NoCounterpart(key, value, _REFUSED[key])
        if key in _DROPPED or (key in _REFUSED and value not in (None, False)):
            notes.append(f"`{key}: {value}` is left out: {_DROPPED.get(key, 'it is what happens here')}")
    made: dict[str, Any] = {key: value for key, value in entry.items() if key in _OURS}
    _shape(entry, made, objective, notes)
    _roles(entry, made)
    if entry.get("name") is not None:  # theirs: the configuration of a hub data set
        made["subset"] = made.pop("name")
        notes.append(f"`name: {entry['name']}` is read as `subset: {entry['name']}`")
    if entry.get("shards") is not None:
        made["shard"] = f"{_whole(entry, 'shards_idx', 0) + 1}/{_whole(entry, 'shards', 1)}"
    if entry.get("train_on_eos") not in (None, "turn"):
        raise NoCounterpart("train_on_eos", entry["train_on_eos"], "the stop of every trained turn is trained")
    paths = _files(entry, made, notes)
    shown = ", ".join(f"{k}: {v}" for k, v in made.items() if k in ("format", "columns", "role_names", "train_roles"))
    notes.append(f"`type: {_type_name(entry)}` of {paths[0]} is read as {shown or 'the shape that its rows have'}")
    return [{**made, "path": path} for path in paths], notes


def _shape(entry: Mapping[str, Any], made: dict[str, Any], objective: str, notes: list[str]) -> None:
    """`format` and `columns` of what `type` and the fields say."""
    kind = entry.get("type")
    own: Mapping[str, Any] = kind if isinstance(kind, Mapping) else {}
    for key in _TEXT_KEYS:
        if own.get(key):
            raise NoCounterpart("type", f"{key}: {own[key]}", "write rows of prompt and completion with it")
    unknown = own.keys() - {*_FIELDS, *_TEXT_KEYS}
    if unknown:
        raise NoCounterpart("type", ", ".join(sorted(unknown)), "fields of a type: field_instruction, field_output, …")
    columns: dict[str, str | None] = {}
    format_: str | None = None
    if isinstance(kind, str):
        format_, columns = _of_type(kind, objective)
        if format_ in ("alpaca", "query_response"):
            notes.append(
                f"`type: {kind}`: rows are conversations in the model's chat template, not in a text of its own"
            )
    elif own:
        format_ = _of_fields(own)
    columns = {**columns, **_named({**entry, **own}, format_)}
    if format_:
        made.setdefault("format", format_)
    if columns:
        made["columns"] = {**columns, **(made.get("columns") or {})}


def _of_fields(own: Mapping[str, Any]) -> str:
    """The format of a type that is a mapping of fields."""
    for key, format_ in (("field_chosen", "preference"), ("field_label", "unpaired"), ("field", "text")):
        if key in own:
            return format_
    return "alpaca"


def _of_type(kind: str, objective: str) -> tuple[str | None, dict[str, str | None]]:
    name = kind.partition(":")[0]
    style, _, how = name.partition(".")
    if name in _TYPES or style in ("sharegpt", "chat_template", "passthrough", "stepwise_supervised", "input_output"):
        format_, columns = _TYPES[name] if name in _TYPES else _TYPES[style]
        return format_, dict(columns)
    if style in _STYLES and how in _ASKED and objective == "kto":
        return "unpaired", {"query": _ASKED[how], "response": "completion"}
    if style in _STYLES and how in _ASKED:
        answers = ("chosen_response", "rejected_response") if how == "argilla" else ("chosen", "rejected")
        return "preference", {"query": _ASKED[how], "response": answers[0], "rejected_response": answers[1]}
    if style in _STYLES and how in ("ultra", "argilla_chat", "default"):
        return ("unpaired" if objective == "kto" else "preference"), {}
    raise NoCounterpart(
        "type", kind, f"known: {', '.join(_TYPES)}; or leave type out and rename columns: columns: {{ours: theirs}}"
    )


def _named(entry: Mapping[str, Any], format_: str | None) -> dict[str, str | None]:
    """Columns that the entry's fields rename, ours <- theirs."""
    turns = "conversations" if format_ == "sharegpt" else "messages"
    ours = {
        "field": "text", "text_column": "text", "field_messages": turns, "field_tools": "tools",
        "field_system": "system", "field_instruction": "instruction", "field_input": "input", "field_output": "output",
        "field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected",
        "field_completion": "completion", "field_label": "label", "field_human": "query", "field_model": "response",
        "field_thinking": f"{turns}.reasoning_content", "message_field_role": f"{turns}.role",
        "message_field_content": f"{turns}.content", "message_field_training": f"{turns}.train",
    }  # fmt: skip
    found: dict[str, str | None] = {}
    for key, name in ours.items():
        value = entry.get(key)
        if value is not None and not isinstance(value, str):
            raise NoCounterpart(key, value, "the name of a column")
        if value is not None and (value != name.rpartition(".")[2] or "." not in name):
            found[name] = value
    mappings = entry.get("message_property_mappings") or {}
    if not isinstance(mappings, Mapping):
        raise NoCounterpart("message_property_mappings", mappings, "{role: from, content: value}")
    found.update({f"{turns}.{name}": str(value) for name, value in mappings.items() if name != value})
    return found


def _roles(entry: Mapping[str, Any], made: dict[str, Any]) -> None:
    roles = entry.get("roles")
    if roles is not None:
        if not isinstance(roles, Mapping) or not all(isinstance(names, list) for names in roles.values()):
            raise NoCounterpart("roles", roles, "{assistant: [gpt, model], user: [human]}")
        made["role_names"] = {str(name): str(ours) for ours, names in roles.items() for name in names}
    trained = entry.get("roles_to_train")
    if trained is not None:
        listed = trained if isinstance(trained, list) else [trained]
        if not listed:
            raise NoCounterpart("roles_to_train", trained, "roles, such as [assistant]")
        names = {"gpt": "assistant", "human": "user", **made.get("role_names", {})}
        made["train_roles"] = [names.get(str(name), str(name)) for name in listed]


def _files(entry: Mapping[str, Any], made: dict[str, Any], notes: list[str]) -> list[str]:
    """Paths of the entry; a split of a plain file is its whole."""
    path, files = entry.get("path"), entry.get("data_files")
    if not isinstance(path, str):
        raise NoCounterpart("path", path, "a file, a directory or a hub id")
    split = made.get("split")
    if isinstance(split, str) and "[" in split:
        raise NoCounterpart("split", split, "max_rows or shard take a part of the rows")
    if files is None:
        if split is not None and path.endswith(_ENDINGS):
            del made["split"]
            if split != "train":
                raise NoCounterpart("split", split, "a file has one split; leave it out")
        return [path]
    listed = files if isinstance(files, list) else [files]
    if not listed or not all(isinstance(name, str) for name in listed):
        raise NoCounterpart("data_files", files, "names of files")
    made.pop("split", None)
    notes.append(f"`data_files` of {path}: {', '.join(listed)}")
    kinds = ("json", "csv", "text", "parquet", "arrow")
    return [name if path in kinds or os.path.isabs(name) else os.path.join(path, name) for name in listed]


def _harmless(key: str, value: Any) -> bool:
    return key == "chat_template" and value == "tokenizer_default"


def _whole(entry: Mapping[str, Any], key: str, least: int) -> int:
    value = entry.get(key, least)
    if type(value) is not int or value < least:
        raise NoCounterpart(key, value, f"a whole number from {least}")
    return value


def _type_name(entry: Mapping[str, Any]) -> str:
    kind = entry.get("type")
    return str(kind) if isinstance(kind, str) else "one of its own" if kind else "(none)"
