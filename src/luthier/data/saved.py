"""Directories that `datasets` saved: which Arrow files they hold, in which order, of which split.

`save_to_disk` writes `state.json` with the names of its files; a DatasetDict writes `dataset_dict.json` and a folder
for each split. A file that the state names and the directory lacks is an error: its rows would be missing without a
word.
"""

from __future__ import annotations

import json
import os
from typing import Any

from luthier.contracts.errors import DataError

_STATE, _SPLITS = "state.json", "dataset_dict.json"


def saved_files(path: str, split: str | None) -> list[str] | None:
    """The Arrow files of a saved directory; None where it is another kind of directory."""
    if os.path.isfile(os.path.join(path, _SPLITS)):
        names = _read(path, _SPLITS).get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
            raise _damaged(path, _SPLITS)
        if split is None and len(names) > 1:
            one = "train" if "train" in names else names[0]
            raise DataError("the directory holds several splits", where=path, value=", ".join(names),
                            remedy=f"say which: {{path: …, split: {one}}}")  # fmt: skip
        chosen = split or names[0]
        if chosen not in names:
            raise DataError("no such split in the saved data set", where=path, value=chosen,
                            remedy=f"one of {', '.join(names)}")  # fmt: skip
        return _files(os.path.join(path, chosen))
    if not os.path.isfile(os.path.join(path, _STATE)):
        return None
    state = _read(path, _STATE)
    if "_data_files" not in state:
        return None
    own = state.get("_split")
    if split is not None and own is not None and split != str(own):
        raise DataError("the saved data set is another split", where=path, value=str(own),
                        remedy=f"leave split out, or give the directory of {split}")  # fmt: skip
    return _files(path)


def _files(path: str) -> list[str]:
    listed = _read(path, _STATE).get("_data_files")
    names = [item.get("filename") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    if not names or not all(isinstance(name, str) and os.path.basename(name) == name for name in names):
        raise _damaged(path, _STATE)
    files = [os.path.join(path, str(name)) for name in names]
    for file in files:
        if not os.path.isfile(file):
            raise DataError("the saved data set lacks a file that it names", where=file,
                            remedy="copy the whole directory again")  # fmt: skip
    return files


def _read(path: str, name: str) -> dict[str, Any]:
    try:
        with open(os.path.join(path, name), encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, name) from error
    if not isinstance(value, dict):
        raise _damaged(path, name)
    return value


def _damaged(path: str, name: str) -> DataError:
    return DataError("the description of a saved data set cannot be read", where=os.path.join(path, name),
                     remedy="save it again with datasets' save_to_disk")  # fmt: skip
