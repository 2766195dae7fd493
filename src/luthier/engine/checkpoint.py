"""A checkpoint is a directory that is wholly there or not at all.

    checkpoint-N.tmp-<uuid>/  *.safetensors, *.json, each fsynced
      -> manifest.json (name, bytes, sha256 of each file; schema; step; identity of the run), fsync
      -> rename to checkpoint-N -> fsync the run directory -> pointer file `latest` by rename
      -> only when the new one is seen whole: rotation of older ones, never the best, never the last verified

Inverses side by side: `save` / `load`. No pickle: tensors are safetensors, everything else is JSON. A directory
that fails verification is renamed to `.bad` and never deleted. kill -9 at any moment leaves either the old set
or the new one. What goes into a checkpoint is the caller's (capture.py); which one to take is resume.py's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from luthier.contracts.errors import CheckpointError
from luthier.disk.durable import replace_text, sha256, sync_directory, write_json
from luthier.disk.fault import fault
from luthier.engine.tensors import write_tensors

SCHEMA = 1
POINTER = "latest"
_NAME = re.compile(r"checkpoint-(\d+)")
_TENSORS = ("weights", "optimizer", "rng")


@dataclass(kw_only=True)
class Content:
    """What one checkpoint holds. `identity` and `benign` are flat `path: value` dictionaries."""

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    state: Mapping[str, Any]
    identity: Mapping[str, Any] = field(default_factory=dict)
    benign: Mapping[str, Any] = field(default_factory=dict)


def save(directory: Path, content: Content) -> Path:
    """Durable and verified in size when this returns; on an OSError nothing is left behind."""
    target = directory / f"checkpoint-{content.step}"
    if target.exists():  # only from a save that was cut off before its pointer, or an older history
        set_aside(target, "superseded")
    working = directory / f"{target.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        fault("checkpoint.begin")
        working.mkdir(parents=True)
        _fill(working, content)
        fault("checkpoint.before_rename")
        os.rename(working, target)
    except OSError:
        shutil.rmtree(working, ignore_errors=True)
        raise
    fault("checkpoint.after_rename")
    sync_directory(directory)
    fault("checkpoint.before_pointer")
    replace_text(directory / POINTER, target.name + "\n")
    fault("checkpoint.after_pointer")
    return target


def load(path: Path) -> Content:
    """Inverse of `save`; the files must be the ones that the manifest names, to the bit."""
    manifest = verify(path)
    state = json.loads((path / "state.json").read_bytes())
    try:
        tensors = {name: load_file(path / f"{name}.safetensors") for name in _TENSORS}
    except SafetensorError as error:
        raise CheckpointError("a tensor file cannot be parsed", where=str(path), value=str(error)) from error
    return Content(
        step=manifest["step"], state=state, identity=manifest["identity"], benign=manifest["benign"], **tensors
    )


def verify(path: Path, *, digests: bool = True) -> dict[str, Any]:
    """The manifest, if every file it names is there with its size (and digest); else CheckpointError."""
    manifest = _manifest(path)
    for entry in manifest["files"]:
        file = path / entry["name"]
        if not file.is_file():
            raise CheckpointError("a file of the checkpoint is missing", where=str(file))
        if (size := file.stat().st_size) != entry["bytes"]:
            raise CheckpointError(
                "a file of the checkpoint has another size", where=str(file),
                value=f"{size} bytes, the manifest says {entry['bytes']}",
            )  # fmt: skip
        if digests and (found := sha256(file)) != entry["sha256"]:
            raise CheckpointError(
                "a file of the checkpoint has another digest", where=str(file),
                value=f"sha256 {found[:16]}…, the manifest says {entry['sha256'][:16]}…",
            )  # fmt: skip
    return manifest


def found(directory: Path) -> list[Path]:
    """The checkpoints of a run by step, newest first; order by number, never by clock."""
    if not directory.is_dir():
        return []
    numbered = [
        (int(m[1]), path) for path in directory.iterdir() if (m := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if not match:
        raise ValueError(f"{path.name} is not a checkpoint's name")
    return int(match[1])


def set_aside(path: Path, suffix: str) -> Path:
    """Rename to `<name>.<suffix>` (numbered if taken); never delete what might be somebody's only copy."""
    for number in range(1000):
        other = path.with_name(f"{path.name}.{suffix}{number or ''}")
        if not other.exists():
            os.rename(path, other)
            return other
    raise CheckpointError("too many set-aside checkpoints", where=str(path))


def sweep(directory: Path) -> list[str]:
    """Remove the unfinished directories of killed saves (only a holder of the lock may)."""
    names = [path.name for path in directory.glob("checkpoint-*.tmp-*") if path.is_dir()]
    for name in names:
        shutil.rmtree(directory / name, ignore_errors=True)
    return sorted(names)


def rotate(directory: Path, *, keep: int, best: int | None, verified: Path) -> list[str]:
    """Delete all but the newest `keep`, the best, and the one just `verified`; returns the names deleted."""
    verify(verified, digests=False)
    spared = set(found(directory)[: max(1, keep)]) | {verified}
    gone = []
    for path in reversed(found(directory)):  # oldest first
        if path in spared or step_of(path) == best:
            continue
        fault("checkpoint.rotation")
        doomed = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")  # a half-deleted one never looks whole
        os.rename(path, doomed)
        fault("checkpoint.mid_rotation")
        shutil.rmtree(doomed, ignore_errors=True)
        gone.append(path.name)
    return gone


def _fill(working: Path, content: Content) -> None:
    entries = []
    for name in _TENSORS:
        fault(f"checkpoint.before_{name}")
        entries.append(write_tensors(working / f"{name}.safetensors", getattr(content, name)))
    entries.append(write_json(working / "state.json", dict(content.state)))
    fault("checkpoint.before_manifest")
    manifest = {
        "schema": SCHEMA, "step": content.step, "files": entries,
        "identity": dict(content.identity), "benign": dict(content.benign),
    }  # fmt: skip
    write_json(working / "manifest.json", {**manifest, "digest": _digest(manifest)})
    sync_directory(working)
    fault("checkpoint.after_manifest")


def _manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError("not a checkpoint: no manifest", where=str(file)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError("the manifest cannot be read", where=str(file), value=str(error)) from error
    wanted = {"schema": int, "step": int, "files": list, "identity": dict, "benign": dict}
    if not isinstance(manifest, dict) or any(not isinstance(manifest.get(k), kind) for k, kind in wanted.items()):
        raise CheckpointError("the manifest is incomplete", where=str(file))
    if manifest.get("digest") != _digest({key: value for key, value in manifest.items() if key != "digest"}):
        raise CheckpointError("the manifest does not match its own digest", where=str(file))
    if manifest["schema"] != SCHEMA:
        raise CheckpointError(
            "a checkpoint of another layout", where=str(file), value=f"schema {manifest['schema']}",
            remedy=f"this version reads schema {SCHEMA}; resume it with the version that wrote it",
        )  # fmt: skip
    names = {str(entry.get("name")) for entry in manifest["files"] if isinstance(entry, dict)}
    wanted_files = {f"{name}.safetensors" for name in _TENSORS} | {"state.json"}
    if names != wanted_files:
        raise CheckpointError("the manifest names other files", where=str(file), value=sorted(names ^ wanted_files))
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    """Of the manifest's meaning, so that a flipped bit in it shows too."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
