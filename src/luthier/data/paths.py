"""What a path of the recipe means: the data files behind a file, a directory, a glob, a split; or a hub id.

Files come sorted by name, so that the order of rows does not depend on the file system; those of a directory that
`datasets` saved (`save_to_disk`, also of several splits) in the order that it says itself (saved.py). Of a directory,
what describes rows is not read as rows: README, LICENSE, dataset_info.json and the like. `hub:name` is a hub id
whatever lies here. A path that leads nowhere is an error with the nearest names that exist.
"""

from __future__ import annotations

import difflib
import glob
import os
import re

from luthier.contracts.errors import DataError
from luthier.data.saved import saved_files

ENDINGS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
    ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow", ".txt": "text", ".text": "text", ".md": "document",
}  # fmt: skip
_SQUEEZED = (".gz", ".zst", ".zstd")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")
_NOT_ROWS = re.compile(
    r"(readme|license|licence|notice|changelog|sources)(\W.*)?"
    r"|(dataset_infos?|dataset_dict|state|config|metadata|manifest|fingerprint)\.json",
    re.IGNORECASE,
)
HUB = "hub:"
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def kind(path: str) -> str | None:
    """What the ending of a file name says: jsonl, json, parquet, csv, arrow, text, document; None = unknown."""
    name = os.path.basename(path).lower()
    for ending in _SQUEEZED:
        name = name.removesuffix(ending)
    return ENDINGS.get(os.path.splitext(name)[1])


def expand(path: str, split: str | None = None) -> list[str]:
    """The data files that a path of the recipe means, in order: a file, a directory, a glob.

    `split` chooses the files of a directory that carry its name (`train-00000.parquet`, `train/…`); without it a
    directory that holds several splits is refused, since it would put the test rows into training.
    """
    if os.path.isfile(path):
        found = [path]
    elif os.path.isdir(path):
        if (saved := saved_files(path, split)) is not None:
            return saved
        found = [
            os.path.join(folder, name)
            for folder, folders, names in os.walk(path)
            for name in names
            if kind(name) and not name.startswith(".") and not _NOT_ROWS.fullmatch(name) and not folders.sort()
        ]
        if not found:
            raise DataError("the directory holds no data file", where=path,
                            remedy=f"files end in one of {' '.join(ENDINGS)}")  # fmt: skip
        return _of_split(path, sorted(found), split)
    elif glob.has_magic(path):
        found = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
    elif is_hub_id(path):
        return [path]
    else:
        found = []
    if not found:
        raise DataError("no file matches" if glob.has_magic(path) else "no such file", where=path,
                        remedy=_nearest(path))  # fmt: skip
    if split is not None:
        raise DataError("a split is chosen from a directory or a hub data set, not from files", where=path, value=split,
                        remedy="leave split out, or give the directory")  # fmt: skip
    return sorted(found)


def _of_split(path: str, files: list[str], split: str | None) -> list[str]:
    marks = {name: set(re.split(r"[^A-Za-z0-9]+", os.path.relpath(name, path).lower())) for name in files}
    present = sorted(one for one in _SPLITS if any(one in marks[name] for name in files))
    if split is not None:
        chosen = [name for name in files if split.lower() in marks[name]]
        if not chosen:
            raise DataError("no file of the directory carries the name of the split", where=path, value=split,
                            remedy=f"it holds {', '.join(present) or 'no split'}: {files[0]}, …")  # fmt: skip
        return chosen
    if len(present) > 1:
        one = "train" if "train" in present else present[0]
        raise DataError("the directory holds several splits", where=path, value=", ".join(present),
                        remedy=f"say which: {{path: …, split: {one}}}")  # fmt: skip
    return files


def is_hub_id(path: str) -> bool:
    """`org/name` that is no path here: neither it nor a folder `org` exists."""
    if path.startswith(HUB):
        return True
    organisation = path.partition("/")[0]
    return bool(_HUB_ID.match(path)) and not os.path.exists(path) and not os.path.isdir(organisation) and not kind(path)


def _nearest(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:
        return f"the directory {folder} does not exist; paths are relative to {os.getcwd()}"
    if not folder and "." not in name and not glob.has_magic(name):
        return f"files have an ending; a name of a dataset_info.json is {{path: …/dataset_info.json, dataset: {name}}}"
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or [name for name in names if kind(name)][:3]
    return f"nearest in {folder or '.'}: {', '.join(close)}" if close else f"{folder or '.'} holds no data file"
