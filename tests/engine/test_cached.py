"""Reference scores on disk: computed once, never half there, never believed where they are damaged."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import rig
from engine.pairs import pair_samples
from luthier.contracts.batch import Batch
from luthier.contracts.errors import NumericError
from luthier.contracts.event import Event, Noted, Scoring
from luthier.engine import cached
from luthier.engine.cached import Cached, samples_digest
from luthier.engine.journal import metric_rows


class Counting:
    """What computes the scores, counting what it is asked for."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.rows = inner, 0

    def ready(self, poll: Any) -> Any:
        yield from ()

    def logprobs(self, batch: Batch) -> Tensor:
        self.rows += len(batch.samples)
        return self.inner.logprobs(batch)


def build(directory: Path, **changes: Any) -> tuple[Cached, Counting]:
    run = rig.build(directory, **{"reference": "cached", "method": "full", **changes})
    assert isinstance(run.reference, Cached)
    run.reference.direct = counting = Counting(run.reference.direct)
    return run.reference, counting


def ready(reference: Cached) -> list[Event]:
    return list(reference.ready(lambda: None))


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def test_the_second_run_computes_nothing(tmp_path: Path) -> None:
    first, computed = build(tmp_path / "a", cache=str(tmp_path / "cache"))
    events = ready(first)
    assert computed.rows == 48 + 6
    assert [(event.done, event.rows) for event in events if isinstance(event, Scoring)] == [(48, 48), (6, 6)]
    second, computed = build(tmp_path / "b", cache=str(tmp_path / "cache"))
    events = ready(second)
    assert computed.rows == 0
    assert all("are taken from" in event.text for event in events if isinstance(event, Noted))
    for batch in second.streams[0].step(0):
        assert torch.equal(first.logprobs(batch), second.logprobs(batch))
        assert (second.logprobs(batch) - computed.inner.logprobs(batch)).abs().max() < 1e-6


def test_the_scores_are_those_of_each_row_whatever_the_batch(tmp_path: Path) -> None:
    reference, counting = build(tmp_path)
    ready(reference)
    for batch in [*reference.streams[0].step(3), *reference.streams[1].batches()]:
        assert (reference.logprobs(batch) - counting.inner.logprobs(batch)).abs().max() < 1e-6


def test_other_rows_facts_or_scored_places_are_other_scores(tmp_path: Path) -> None:
    samples = pair_samples(4)
    assert samples_digest(samples) == samples_digest(pair_samples(4))
    assert len({samples_digest(s) for s in (samples, samples[:3], samples[::-1], pair_samples(4, seed=1))}) == 4
    reference, _ = build(tmp_path, cache=str(tmp_path / "cache"), evaluation=0)
    ready(reference)
    other, computed = build(tmp_path / "b", cache=str(tmp_path / "cache"), evaluation=0)
    other.facts = {"base": "another"}
    ready(other)
    assert computed.rows == 48
    assert len(files(tmp_path / "cache")) == 2


def spoil_bytes(place: Path) -> None:
    file = place / "scores.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def spoil_manifest(place: Path) -> None:
    (place / "manifest.json").write_text("{")


def spoil_rows(place: Path) -> None:
    """Whole, but of other rows."""
    ends = torch.arange(1, 49)
    entry = cached.write_tensors(place / "scores.safetensors", {"scores": torch.zeros(48), "ends": ends})
    cached.write_json(place / "manifest.json", {"file": entry, "facts": {}})


def spoil_file(place: Path) -> None:
    (place / "scores.safetensors").unlink()


@pytest.mark.parametrize("spoil", [spoil_bytes, spoil_manifest, spoil_rows, spoil_file])
def test_what_is_damaged_is_computed_again(tmp_path: Path, spoil: Any) -> None:
    first, _ = build(tmp_path / "a", cache=str(tmp_path / "cache"), evaluation=0)
    ready(first)
    (place,) = files(tmp_path / "cache")
    spoil(place)
    second, computed = build(tmp_path / "b", cache=str(tmp_path / "cache"), evaluation=0)
    notes = [event.text for event in ready(second) if isinstance(event, Noted) and event.level == "warning"]
    assert computed.rows == 48
    assert len(notes) == 1
    assert "computed again" in notes[0]
    third, computed = build(tmp_path / "c", cache=str(tmp_path / "cache"), evaluation=0)
    ready(third)
    assert computed.rows == 0


def test_the_newest_few_stay(tmp_path: Path) -> None:
    reference, _ = build(tmp_path, cache=str(tmp_path / "cache"), evaluation=0)
    for number in range(cached.KEPT + 3):
        reference.facts = {"base": str(number)}
        ready(reference)
    told = {json.loads((path / "manifest.json").read_text())["facts"]["base"] for path in files(tmp_path / "cache")}
    assert len(told) == cached.KEPT
    assert str(cached.KEPT + 2) in told


def test_a_score_that_is_not_finite_names_the_row_and_is_not_kept(tmp_path: Path) -> None:
    reference, counting = build(tmp_path, cache=str(tmp_path / "cache"), evaluation=0)
    inner = counting.inner

    class Spoilt:
        def logprobs(self, batch: Batch) -> Tensor:
            found = inner.logprobs(batch).clone()
            wrong = [i for i, source in enumerate(batch.sources) if source.line == 7]
            found[[int(batch.group_Q[q]) in wrong for q in batch.sequence_N]] = float("inf")
            return found

    counting.inner = Spoilt()
    with pytest.raises(NumericError, match=r"pairs\.jsonl:7"):
        ready(reference)
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_costs_the_cache_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, computed = build(tmp_path, cache=str(tmp_path / "cache"), evaluation=0)
    monkeypatch.setenv("LUTHIER_FAULT", "durable.write:1+:ENOSPC")
    notes = [event.text for event in ready(reference) if isinstance(event, Noted)]
    assert computed.rows == 48
    assert "could not be kept" in notes[0]
    assert not files(tmp_path / "cache")


# ------------------------------------------------------------------ killed and resumed


@pytest.mark.parametrize(
    ("kind", "method"),
    [("method_off", "lora"), ("frozen_copy", "full"), ("cached", "full"), ("cached", "lora")],
)
def test_a_killed_run_resumes_with_the_reference_of_its_start(
    server: rig.Server, tmp_path: Path, kind: str, method: str
) -> None:
    """Killed in its second save; the cache is thrown away in between, so that scores must be made again."""
    options = {"reference": kind, "method": method, "learning_rate": 1e-3}
    assert server.run(tmp_path / "whole", **options) == 0, (tmp_path / "whole" / "child.log").read_text()
    broken = tmp_path / "broken"
    code = server.run(broken, {"LUTHIER_FAULT": "checkpoint.after_rename:2"}, **options)
    assert code == -signal.SIGKILL, (broken / "child.log").read_text()
    for path in (broken / "cache").glob("*/scores.safetensors"):
        path.unlink()
    assert server.run(broken, resume="auto", **options) == 0, (broken / "child.log").read_text()
    assert rig.final_digests(broken) == rig.final_digests(tmp_path / "whole")
    assert metric_rows(broken / "journal.jsonl") == metric_rows(tmp_path / "whole" / "journal.jsonl")


def test_killed_while_keeping_leaves_nothing_that_looks_whole(server: rig.Server, tmp_path: Path) -> None:
    options = {"reference": "cached", "method": "full", "steps": 2, "evaluation": 0}
    code = server.run(tmp_path, {"LUTHIER_FAULT": "reference.before_rename"}, **options)
    assert code == -signal.SIGKILL
    (left,) = files(tmp_path / "cache")
    assert left.suffix == ".making"
    assert server.run(tmp_path, resume="auto", **options) == 0, (tmp_path / "child.log").read_text()
    assert len([path for path in files(tmp_path / "cache") if path.suffix != ".making"]) == 1
