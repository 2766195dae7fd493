"""A model directory, looked at before anything in it reaches a loader: JSON and safetensors only, no code.

Refused, each with one line: keys that lead to code (`auto_map`, `trust_remote_code`, `_attn_implementation*`,
kernel repositories named in any configuration, nested ones too), pickled weights, broken or
missing shards, shard names that leave the directory, adapters given as models. There is no second, less careful
way to load. A hub id is looked up in the local cache only.

`fingerprint` is a sha256 over configuration, tensor headers, sizes and evenly spread samples of the data: it
tells two fine-tunings of one base apart without reading gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from luthier.contracts.errors import LuthierError, ModelError, raise_all

_SCANNED = ("config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json")
_CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipelines", "custom_generate"})
_KERNEL_KEY = re.compile(r"(attn|attention|experts)_implementation|kernel", re.IGNORECASE)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+([@:].*)?")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LARGEST_JSON, _LARGEST_HEADER = 64 << 20, 100 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def find_directory(path: str, revision: str | None = None) -> Path:
    """The local directory of a model: a path, or a hub id that the local cache holds."""
    local = Path(path).expanduser()
    if local.is_dir() and revision:
        raise ModelError("a local directory has no revisions", where="model.revision", value=revision,
                         remedy="leave it out, or give a hub id as model.path")  # fmt: skip
    if local.is_dir():
        return local
    if local.exists():
        raise ModelError("a model is a directory", where=str(path), remedy="pass the directory that holds config.json")
    if local.is_absolute() or not _HUB_ID.fullmatch(path) or path.startswith("."):
        raise ModelError("no such directory", where=path, remedy="pass a local directory that holds config.json")
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        raise ModelError(
            "no such directory, and the local hub cache does not hold a model of this name",
            where=path,
            remedy=f"fetch it once with `hf download {path}`, or pass the path of a local directory",
        ) from None


def read_json(file: Path) -> Any:
    """Parsed JSON of one configuration file, or ModelError with its place."""
    if file.stat().st_size > _LARGEST_JSON:
        raise ModelError("a configuration file of this size is not read", where=str(file), value=file.stat().st_size)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"not JSON: {error.msg}", where=f"{file}:{error.lineno}:{error.colno}") from None
    except UnicodeDecodeError:
        raise ModelError("not UTF-8", where=str(file)) from None
    except RecursionError:
        raise ModelError("nested too deeply", where=str(file)) from None


def scan(directory: Path) -> dict[str, Any]:
    """The parsed config.json of a directory that may be loaded; every objection at once otherwise."""
    if not (directory / "config.json").is_file():
        adapter = (directory / "adapter_config.json").is_file()
        raise ModelError(
            "this directory holds an adapter, not a model" if adapter else "no config.json: not a model directory",
            where=str(directory),
            remedy="pass the adapter's base as the model" if adapter else "pass a directory in Hugging Face layout",
        )
    found: list[LuthierError] = []
    for name in _SCANNED:
        file = directory / name
        if not file.is_file():
            continue
        for where, value in _unsafe(read_json(file)):
            found.append(
                ModelError(
                    "this key leads to code outside this program and is never followed",
                    where=f"{file}: {where}",
                    value=value,
                    remedy="remove the key, if the model's family is part of transformers",
                )
            )
    if (directory / "adapter_config.json").is_file():
        found.append(
            ModelError(
                "an adapter lies among the model's files and would be applied unseen",
                where=str(directory / "adapter_config.json"),
                remedy="merge it first, or move it away",
            )
        )
    raise_all(found)
    config = read_json(directory / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError("no model_type", where=str(directory / "config.json"))
    return config


def _unsafe(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every key that could lead to code."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unsafe(item, f"{where}[{index}]")
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        path = f"{where}.{key}" if where else key
        if _leads_to_code(key, item):
            yield path, item
        else:
            yield from _unsafe(item, path)


def _leads_to_code(key: str, item: Any) -> bool:
    if item is None or item is False:
        return False
    if key in _CODE_KEYS:
        return True
    if key.startswith("_attn_implementation"):
        return not isinstance(item, bool)  # `_attn_implementation_autoset: true` of older files says nothing
    if not _KERNEL_KEY.search(key):
        return False
    texts = item.values() if isinstance(item, dict) else item if isinstance(item, list) else [item]
    return any(isinstance(text, str) and _REPOSITORY.fullmatch(text) is not None for text in texts)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the model, checked to be whole."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        entries = read_json(index)
        shards = entries.get("weight_map") if isinstance(entries, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ModelError("no weight_map", where=str(index))
        names = sorted(set(shards.values()))
    else:
        pickled = sorted(file.name for pattern in _PICKLED for file in directory.glob(pattern))
        raise ModelError(
            "weights are pickled, and pickle can run any code" if pickled else "no model.safetensors",
            where=str(directory),
            value=pickled[0] if pickled else None,
            remedy="convert them to safetensors in a place you trust: save_pretrained does" if pickled else None,
        )
    files = []
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError("a shard must be a safetensors file beside its index", where=str(index), value=name)
        if not (directory / name).is_file():
            raise ModelError("a shard is missing", where=str(directory / name))
        tensor_header(directory / name)
        files.append(directory / name)
    return files


def tensor_header(file: Path) -> bytes:
    """The JSON header of a safetensors file whose length fits its tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ModelError("not a whole safetensors file", where=str(file), value=f"{size} bytes")
        header = stream.read(length)
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0) == size
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ModelError("the header is not safetensors", where=str(file)) from None
    if not whole:
        raise ModelError("the file is shorter or longer than its header says", where=str(file), value=f"{size} bytes")
    return header


def fingerprint(directory: Path) -> str:
    """sha256 of configuration, headers, sizes and samples of the data: seconds even for large models."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in weight_files(directory):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        digest.update(tensor_header(file))
        with file.open("rb") as stream:
            step = max(_SAMPLE_BYTES, size // _SAMPLES)
            for offset in range(0, size, step):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
