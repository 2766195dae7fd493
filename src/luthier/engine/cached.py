"""Reference scores computed once and kept on disk, for methods that change the base itself: no second copy of it.

    <root>/<key>/scores.safetensors   scores: float32, the scored tokens of all samples one after another
                                      ends: int64, where each sample's own end
                 manifest.json        size and sha256 of that file, and what the key was made of

The key is a digest of all that decides the scores: base, samples' tokens and scored places, arithmetic, versions. It
is made in a directory beside and renamed into place when whole, so a run killed while it computes or writes leaves
nothing that the next one could take for scores; what does not verify is computed again, and said. The newest few stay.

Only samples known before the first step can be kept: an objective that scores others (`beforehand`) is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.event import Event, Noted, Scoring
from luthier.contracts.record import Sample
from luthier.data.stream import Stream
from luthier.disk.durable import sha256, sync_directory, write_json
from luthier.disk.fault import fault
from luthier.engine.recovery import fitting
from luthier.engine.scoring import check_finite
from luthier.engine.task import Reference
from luthier.engine.tensors import write_tensors
from luthier.recipe.fingerprint import digest

LAYOUT = 1  # raise it when scores or their file mean something else
KEPT = 8
_DAY_SECONDS = 86_400.0
_SAY_SECONDS = 5.0


def cache_root() -> Path:
    """The user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "luthier" / "reference"


@dataclass
class Cached:
    """`direct` scores while the weights still are the start's; `facts` is what decides scores besides the samples."""

    direct: Reference
    streams: Sequence[Stream]
    facts: Mapping[str, Any]
    device: torch.device
    root: Path = field(default_factory=cache_root)
    _scores: list[Tensor] = field(default_factory=list)
    _places: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # sample id -> (stream, from, to)

    def logprobs(self, batch: Batch) -> Tensor:
        """logprobs_N of the batch's samples, as they were kept."""
        if not self._scores:
            raise RuntimeError("cached reference scores are asked for before they are ready")
        places = [self._places[sample] for sample in batch.samples]
        return torch.cat([self._scores[s][start:end] for s, start, end in places]).to(batch.tokens_T.device)

    def ready(self, poll: Callable[[], None]) -> Iterator[Event]:
        """Find the scores, or compute and keep them."""
        self._scores.clear()
        for number, stream in enumerate(self.streams):
            ends = np.cumsum([_scored(sample) for sample in stream.samples])
            place = self.root / digest([LAYOUT, dict(self.facts), samples_digest(stream.samples)])[:32]
            found, notes = _taken(place, ends)
            yield from notes
            if found is None:
                found = torch.full((int(ends[-1]),), float("nan"))
                yield from self._computed(stream, ends, found, poll)
                yield from self._kept(place, found, ends)
            self._scores.append(found)
            for sample, end in zip(stream.samples, ends.tolist(), strict=True):
                self._places[sample.id] = (number, end - _scored(sample), end)

    def _computed(
        self, stream: Stream, ends: NDArray[Any], into: Tensor, poll: Callable[[], None]
    ) -> Iterator[Event]:  # fmt: skip
        end_of = {sample.id: end for sample, end in zip(stream.samples, ends.tolist(), strict=True)}
        started = told = time.perf_counter()
        done, notes = 0, list[str]()

        def scores(batch: Batch) -> Tensor:
            poll()
            return self.direct.logprobs(batch.to(self.device)).float().cpu()

        for batch, found in fitting(stream, scores, notes.append):
            while notes:
                yield Noted("warning", f"reference scores: {notes.pop(0)}")
            check_finite(found, batch)
            counts = torch.bincount(batch.group_Q[batch.sequence_N], minlength=len(batch.samples)).tolist()
            for sample, part in zip(batch.samples, found.split(counts), strict=True):
                into[end_of[sample] - len(part) : end_of[sample]] = part
            done, now = done + len(batch.samples), time.perf_counter()
            if now - told >= _SAY_SECONDS or done == len(stream.samples):
                told = now
                yield Scoring(done, len(stream.samples), now - started)

    def _kept(self, place: Path, scores: Tensor, ends: NDArray[Any]) -> Iterator[Event]:
        try:
            _write(place, scores, ends, self.facts)
            _forget(place)
        except OSError as error:
            yield Noted("warning", f"reference scores could not be kept: {error.strerror} {error.filename or ''}")
            return
        yield Noted("info", f"reference scores of {len(ends):,} rows are kept in {place}")


def samples_digest(samples: Sequence[Sample]) -> str:
    """Of everything about samples that decides their scores: tokens, tree, scored places."""
    state = hashlib.sha256()
    for sample in samples:
        for piece in sample.pieces:
            state.update(f"{piece.parent}:{len(piece.tokens)};".encode())
            state.update(np.asarray(piece.tokens, dtype=np.int64).tobytes())
            state.update(np.packbits(np.asarray(piece.weights) != 0).tobytes())
        state.update(b"/")
    return state.hexdigest()


def _scored(sample: Sample) -> int:
    return sum(int(np.count_nonzero(piece.weights)) for piece in sample.pieces)


def _taken(place: Path, ends: NDArray[Any]) -> tuple[Tensor | None, list[Event]]:
    """What is kept there, if it is whole; else None and, where something is there, why it cannot be used."""
    if not place.exists():
        return None, []
    try:
        scores = _read(place, ends)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        why = str(error) or type(error).__name__
        shutil.rmtree(place, ignore_errors=True)
        return None, [Noted("warning", f"kept reference scores cannot be used ({why}): they are computed again")]
    os.utime(place)
    return scores, [Noted("info", f"reference scores of {len(ends):,} rows are taken from {place}")]


def _read(place: Path, ends: NDArray[Any]) -> Tensor:
    """Inverse of `_write`."""
    manifest, file = json.loads((place / "manifest.json").read_bytes()), place / "scores.safetensors"
    if sha256(file) != manifest["file"]["sha256"]:
        raise ValueError("another digest than its manifest says")
    tensors = load_file(file)
    scores = tensors["scores"]
    if scores.dtype != torch.float32 or not np.array_equal(tensors["ends"].numpy(), ends):
        raise ValueError("scores of other rows")
    if len(scores) != ends[-1] or not bool(torch.isfinite(scores).all()):
        raise ValueError("scores are missing or not finite")
    return scores


def _write(place: Path, scores: Tensor, ends: NDArray[Any], facts: Mapping[str, Any]) -> None:
    making = place.with_name(f"{place.name}.{os.getpid()}.making")
    making.mkdir(parents=True, exist_ok=True)
    try:
        entry = write_tensors(making / "scores.safetensors", {"scores": scores, "ends": torch.from_numpy(ends)})
        write_json(making / "manifest.json", {"file": entry, "facts": dict(facts)})
        sync_directory(making)
        fault("reference.before_rename")
        if not place.exists():  # else another run was faster, with the same
            os.rename(making, place)
            sync_directory(place.parent)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _forget(place: Path) -> None:
    """Keep the newest few, and nothing that a killed run left half."""
    others = [path for path in place.parent.iterdir() if path != place]
    whole = sorted((path for path in others if path.suffix != ".making"), key=lambda path: path.stat().st_mtime)
    torn = [p for p in others if p.suffix == ".making" and time.time() - p.stat().st_mtime > _DAY_SECONDS]
    for path in [*torn, *whole[: max(0, len(whole) - KEPT + 1)]]:
        shutil.rmtree(path, ignore_errors=True)
