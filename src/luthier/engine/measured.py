"""What a regularizer measures on single rows before the first step, and keeps in the run's directory.

    <run>/measured/<digest>.safetensors      its tensors; the digest is of its fields and of the rows' tokens
    <run>/measured/<digest>.json             size and sha256 of that file

The rows go through the model one at a time, in eval mode, under the weights of the start: -log p of everything that
is scored in a row. A resumed run reads the file, so that it goes on with the very numbers; where none lies (a named
checkpoint of another directory) or one is torn, they are measured again, which on the same machine gives the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from luthier.contracts.event import Event, Noted, Scoring
from luthier.contracts.record import Sample
from luthier.contracts.regularizer import Regularizer
from luthier.data.collate import collate
from luthier.disk.durable import sha256, write_json
from luthier.engine.cached import samples_digest
from luthier.engine.modes import at_rest
from luthier.engine.task import Run
from luthier.engine.tensors import write_tensors
from luthier.recipe.fingerprint import digest


def measure(regularizer: Regularizer, rows: Sequence[Sample], run: Run, poll: Callable[[], None]) -> Iterator[Event]:
    """Fill what the regularizer keeps of the start: from the directory, or from the rows."""
    place = run.directory / "measured" / digest([repr(regularizer), samples_digest(rows)])[:32]
    file, model = place.with_suffix(".safetensors"), run.trunk.model
    if file.exists():
        try:
            if sha256(file) != json.loads(place.with_suffix(".json").read_bytes())["sha256"]:
                raise ValueError("another digest than its note says")
            regularizer.load(model, load_file(file))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            yield Noted("warning", f"{file.name} cannot be used ({error}): {len(rows)} rows are measured again")
        else:
            yield Noted("info", f"what {len(rows)} rows gave before the first step is taken from {file.name}")
            return
    started = time.perf_counter()
    with at_rest(model):
        regularizer.measure(model, _losses(rows, run, poll))
    yield Scoring(len(rows), len(rows), time.perf_counter() - started)
    _keep(place, regularizer.tensors(model))


def _losses(rows: Sequence[Sample], run: Run, poll: Callable[[], None]) -> Iterator[Tensor]:
    for row in rows:
        poll()
        batch = collate([row]).to(run.device)
        with run.precision.autocast(run.device):
            logprobs_N = run.trunk.logprobs(batch)
        yield -logprobs_N.float().dot(batch.weights_N)


def _keep(place: Path, tensors: dict[str, Tensor]) -> None:
    """The note last: tensors without one are not taken."""
    place.parent.mkdir(exist_ok=True)
    entry = write_tensors(place.with_suffix(".safetensors"), {n: t.detach().cpu() for n, t in tensors.items()})
    write_json(place.with_suffix(".json"), entry)
