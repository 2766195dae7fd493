"""What the gate is given to check (`GateSpec`), and what one check says (`Check`).

The checks themselves are in gate_rows.py (on the rows) and gate_numbers.py (on the model); gate.py runs them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.contracts.record import Sample
from luthier.data.stream import Stream
from luthier.engine.scoring import Scorer

EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row's prompt as inference would feed it, beside the ids that were trained."""

    source: str
    inference: Sequence[int]
    trained: Sequence[int]
    beyond: str | None = None  # what inference adds after the role header that the row has not, where that is all


@dataclass(kw_only=True, frozen=True)
class GateSpec:
    """What is checked. `roles`: supervised tokens by role, where known. `dropped`: reason -> rows, of `rows_read`."""

    scorer: Scorer
    stream: Stream
    stop_ids: Sequence[int] = ()
    bos_id: int | None = None
    prompts: Sequence[Prompt] = ()
    roles: Mapping[str, int] = field(default_factory=dict)
    rows_read: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # how rows run, and how that was shown


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: str  # pass | warn | fail | skip
    evidence: dict[str, Any]
    remedy: str = ""


def sources_of(samples: Sequence[Sample]) -> list[str]:
    return [str(sample.source) for sample in samples[:EXAMPLES]]
