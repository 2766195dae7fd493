"""LLaMA-Factory's `dataset_info.json`, read as it is: each entry becomes a source of ours, with a note of how.

    {path: data/dataset_info.json, dataset: "alpaca_en_demo,dpo_en_demo"}

    formatting   alpaca -> alpaca (preference with `ranking`, unpaired with `kto_tag`; text where the rows have only the
                 column `prompt`), sharegpt -> sharegpt, openai -> messages, each likewise
    columns      theirs of ours; as in LLaMA-Factory, `system`, `history` and `tools` that are not named are not read
    tags         names of the fields of a turn, and of the roles
    file_name    beside the file itself; num_samples -> max_rows; subset, split, hf_hub_url -> a hub data set

What cannot be done is refused by the entry's name: pictures, sound, scripts, other hubs, remote files. A key that
LLaMA-Factory does not know is an error here: it would not read it, and say nothing.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from luthier.contracts.errors import DataError
from luthier.data.bytestream import chunks
from luthier.data.paths import HUB, expand
from luthier.data.source import read_rows
from luthier.data.strict_json import Fault, parse
from luthier.recipe.recipe import DataSource

NAME = "dataset_info.json"
_KNOWN = {
    "file_name", "formatting", "ranking", "columns", "tags", "num_samples", "split", "subset", "folder", "hf_hub_url",
    "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name",
}  # fmt: skip
_COLUMNS = {
    "prompt", "query", "response", "history", "messages", "system", "tools", "chosen", "rejected", "kto_tag",
    "images", "videos", "audios",
}  # fmt: skip
_MEDIA = ("images", "videos", "audios")
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_ROLES = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call",
    "system_tag": "system",
}  # fmt: skip


def is_dataset_info(path: str) -> bool:
    return os.path.basename(path) == NAME and os.path.isfile(path)


def entries(source: DataSource) -> Iterator[tuple[DataSource, str]]:
    """The sources behind the names of `dataset`, each with a note."""
    path = os.path.join(source.path, NAME) if os.path.isdir(source.path) else source.path
    known = _read(path)
    names = [name.strip() for name in (source.dataset or "").split(",") if name.strip()]
    if not names:
        raise DataError("which of its data sets?", where=path, value=f"{len(known)} entries",
                        remedy=f"name some: dataset: {', '.join(list(known)[:3])}")  # fmt: skip
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, list(known), n=3) or list(known)[:5]
            raise DataError(
                "no such data set in the file", where=path, value=name, remedy=f"nearest: {', '.join(close)}"
            )
        entry = _Entry(path, name, known[name])
        made = entry.source(source)
        yield made, entry.note(made)


class _Entry:
    """One entry, checked as it is read."""

    def __init__(self, path: str, name: str, entry: Any) -> None:
        self.path, self.name = path, name
        if not isinstance(entry, dict):
            raise self.wrong("the entry is not an object", "", type(entry).__name__, '{"file_name": …}')
        self.entry = entry
        self._only(entry, _KNOWN, "")
        self.columns, self.tags = self._names("columns", _COLUMNS), self._names("tags", set(_TAGS))
        self.formatting = entry.get("formatting", "alpaca")
        if self.formatting not in ("alpaca", "sharegpt", "openai"):
            raise self.wrong("unknown formatting", "formatting", self.formatting, "alpaca, sharegpt or openai")
        for kind in _MEDIA:
            if kind in self.columns:
                raise self.wrong(f"the data set has {kind}, and only text is trained on", f"columns.{kind}",
                                 self.columns[kind], "leave it out")  # fmt: skip

    def wrong(self, what: str, field: str, value: Any, remedy: str) -> DataError:
        place = f"{self.path}:{self.name}" + (f".{field}" if field else "")
        return DataError(what, where=place, value=value, remedy=remedy)

    def source(self, asked: DataSource) -> DataSource:
        """A source of ours that reads what the entry describes."""
        path, split, subset = self._place()
        format_, columns = self._shape(path, split)
        limit = self.entry.get("num_samples")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise self.wrong("not a number of rows", "num_samples", limit, "a whole number above 0")
        if asked.max_rows is not None:
            limit = min(asked.max_rows, limit or asked.max_rows)
        given = {name: getattr(asked, name) for name in ("weight", "train_roles", "shard")}
        given["name"] = asked.name or self.name
        return DataSource(
            path=path, split=split, subset=subset, format=format_, columns=columns, role_names=self._role_names(),
            max_rows=limit, **given,
        )  # fmt: skip

    def note(self, made: DataSource) -> str:
        names = ", ".join(f"{ours} <- {theirs}" for ours, theirs in (made.columns or {}).items()
                          if theirs not in (None, ours))  # fmt: skip
        return f"{self.path}: `{self.name}` is read as {made.format} of {made.path}" + (f" ({names})" if names else "")

    def _place(self) -> tuple[str, str | None, str | None]:
        entry = self.entry
        for key, said in (("script_url", "a loading script, and code of a data set is never run"),
                          ("cloud_file_name", "a remote file")):  # fmt: skip
            if entry.get(key):
                raise self.wrong(f"the data set is {said}", key, entry[key], "give its rows as a file: file_name")
        split, subset = entry.get("split"), entry.get("subset")
        if entry.get("hf_hub_url"):
            if entry.get("folder"):
                raise self.wrong("a folder of a hub data set is not read", "folder", entry["folder"],
                                 "download it and give file_name")  # fmt: skip
            return HUB + str(entry["hf_hub_url"]), split or "train", subset
        if not isinstance(entry.get("file_name"), str):
            hubs = [key for key in ("ms_hub_url", "om_hub_url") if entry.get(key)]
            what = "the data set is on another hub only" if hubs else "the entry names no file"
            raise self.wrong(what, hubs[0] if hubs else "file_name", entry.get(hubs[0]) if hubs else None,
                             "download it and give file_name")  # fmt: skip
        path = os.path.join(os.path.dirname(self.path), entry["file_name"])
        if not os.path.exists(path):
            raise self.wrong("no such file", "file_name", entry["file_name"], f"put it beside {NAME}")
        return path, split if os.path.isdir(path) else None, subset

    def _shape(self, path: str, split: str | None) -> tuple[str, dict[str, str | None]]:
        """The format and the columns, ours <- theirs."""
        ranking, judged = bool(self.entry.get("ranking")), "kto_tag" in self.columns
        alpaca = self.formatting == "alpaca"
        mapped: dict[str, str | None]
        if alpaca:
            mapped = {"instruction": self.columns.get("prompt", "instruction"),
                      "input": self.columns.get("query", "input")}  # fmt: skip
            answer, plain = self.columns.get("response", "output"), "alpaca"
            alone = not ranking and not judged and "response" not in self.columns and "prompt" in self.columns
            if alone and answer not in self._first_row(path, split):
                return "text", {"text": self.columns["prompt"]}
            if not ranking:
                mapped["output"] = answer
            names: tuple[str, ...] = ("system", "history", "tools")
        else:
            ours, plain = ("conversations", "sharegpt") if self.formatting == "sharegpt" else ("messages", "messages")
            mapped = {ours: self.columns.get("messages", "conversations")}
            mapped[f"{ours}.role"], mapped[f"{ours}.content"] = self._tag("role_tag"), self._tag("content_tag")
            names = ("system", "tools")
        mapped |= {name: self.columns.get(name) for name in names}
        if ranking:
            mapped |= {name: self.columns.get(name, name) for name in ("chosen", "rejected")}
        if judged:
            mapped["label"] = self.columns["kto_tag"]
        return "preference" if ranking else "unpaired" if judged else plain, self._there(mapped, path, split)

    def _there(self, mapped: dict[str, str | None], path: str, split: str | None) -> dict[str, str | None]:
        """Without the columns that only the defaults name and the rows need not have."""
        row = self._first_row(path, split)
        said = {*self.columns.values(), *self.tags.values()}
        optional = {ours for ours, theirs in mapped.items() if theirs not in said and "." not in ours}
        return {ours: theirs for ours, theirs in mapped.items()
                if theirs is None or not row or ours not in optional or theirs in row}  # fmt: skip

    def _first_row(self, path: str, split: str | None) -> Mapping[str, Any]:
        """The first row that can be read; none of a hub data set, which is not fetched for this."""
        if path.startswith(HUB):
            return {}
        for file in expand(path, split):
            for row, _ in read_rows(file, lambda error, source: None):
                return row
        return {}

    def _role_names(self) -> dict[str, str] | None:
        if self.formatting == "alpaca":
            return None
        return {self._tag(tag): ours for tag, ours in _ROLES.items()}

    def _tag(self, name: str) -> str:
        if self.formatting == "openai" and name not in self.tags:
            return {"role_tag": "role", "content_tag": "content", **_ROLES}[name]
        return self.tags.get(name, _TAGS[name])

    def _names(self, field: str, known: set[str]) -> dict[str, str]:
        given = self.entry.get(field, {})
        if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
            raise self.wrong("not a mapping of names", field, type(given).__name__, '{"prompt": "column"}')
        self._only(given, known, f"{field}.")
        return given

    def _only(self, given: Mapping[str, Any], known: set[str], prefix: str) -> None:
        for key in given:
            if key not in known:
                close = difflib.get_close_matches(key, sorted(known), n=1)
                remedy = f"did you mean {close[0]}?" if close else f"one of {', '.join(sorted(known))}"
                raise self.wrong("unknown key", f"{prefix}{key}", key, remedy)


def _read(path: str) -> dict[str, Any]:
    expand(path)  # no such file: an error with the nearest names
    try:
        value = parse(b"".join(chunks(path)).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8", where=path, remedy="save the file as UTF-8") from error
    except Fault as fault:
        raise DataError(fault.what, where=path, remedy=fault.remedy) from fault
    if not isinstance(value, dict) or not value:
        raise DataError("not a list of data sets", where=path, value=type(value).__name__,
                        remedy='{"name": {"file_name": "rows.json"}, …}')  # fmt: skip
    return value
