"""An encoder of characters that other processes can open too, and small files of rows with every fate."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.record import Completion, Piece, Record, Sample
from luthier.data.ledger import Dropped


@dataclass
class Letters:
    """One token a character; what a completion says decides what becomes of it."""

    limit: int = 60
    escaped: int = 0

    def samples(self, record: Record) -> list[Sample]:
        assert isinstance(record, Completion)
        tokens = [ord(letter) for letter in record.prompt + record.completion]
        if "wrong" in record.completion:
            raise DataError("the encoder refuses", where=str(record.source), remedy="no")
        if "policy" in record.completion:
            raise RecipeError("no such policy", where="data", remedy="another")
        if "killed" in record.completion:
            os.kill(os.getpid(), signal.SIGKILL)
        if "fault" in record.completion:
            raise ZeroDivisionError("a fault of ours")
        if "slow" in record.completion:
            time.sleep(0.2)
        if len(tokens) > self.limit:
            raise Dropped("longer than max_tokens")
        self.escaped += record.completion.count("<")
        weights = [0.0] * len(record.prompt) + [0.5 if "half" in record.completion else 1.0] * len(record.completion)
        pieces = [Sample((Piece(tokens, weights),), record.source)]
        return pieces * 2 if "twice" in record.completion else pieces


def row(i: int, fate: str = "") -> dict[str, str]:
    return {"prompt": f"p{i} ", "completion": f"c{i}{fate}"}


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return str(path)


def mixed(path: Path, count: int = 700) -> str:
    """A file with good, dropped, doubled, half-weighted, wrong and broken rows."""
    fates = ["", "", " twice", " half<", " " + "x" * 80, "", " wrong", "<<"]
    rows: list[Any] = [row(i, fates[i % len(fates)]) for i in range(count)]
    rows[33], rows[400] = "{broken", {"prompt": "p", "completion": ""}
    return write(path, rows)


def told(prepared: Any) -> dict[str, Any]:
    """Everything that must not depend on how rows were encoded, as plain data."""

    def shown(sample: Sample) -> list[Any]:
        pieces: list[Any] = [
            [p.tokens.tolist(), p.weights.tolist(), str(p.tokens.dtype), str(p.weights.dtype), p.parent]  # type: ignore[union-attr]
            for p in sample.pieces
        ]
        return [sample.id, str(sample.source), pieces, sample.sequences, dict(sample.extra)]

    return {
        "train": [shown(sample) for sample in prepared.train],
        "evaluation": [shown(sample) for sample in prepared.evaluation],
        "train_records": list(prepared.train_records),
        "evaluation_records": list(prepared.evaluation_records),
        "ledger": prepared.ledger.to_json(), "rejects": prepared.ledger.rejects, "fingerprint": prepared.fingerprint,
    }  # fmt: skip
