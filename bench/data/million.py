"""Near duplicates of a million rows in a process of its own: `python -m bench.data.million ROWS` prints one JSON line.

As a build does it: rows are made when they are read, sketches lie in a file that is mapped, and the peak of resident
memory is that of the whole process, interpreter and libraries included.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.data.worded import Worded
from luthier.contracts.step import Room
from luthier.data.steps.near_dedup import NearDedup

_BATCH = 512


def main(count: int) -> None:
    rows, step, room = Worded(count, 600), NearDedup(), Room(Path())
    sketcher = step.sketch(room)
    kind = sketcher([]).dtype
    sketched = 0.0
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "sketches"
        with path.open("wb") as file:
            for at in range(0, count, _BATCH):
                batch = [rows[i] for i in range(at, min(count, at + _BATCH))]
                begin = time.process_time()
                file.write(sketcher(batch).tobytes())
                sketched += time.process_time() - begin
        begin = time.process_time()
        made = step.decide(np.memmap(path, dtype=kind, mode="r", shape=(count,)), rows, room)
        decided = time.process_time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"sketched_s": sketched, "decided_s": decided, "peak_bytes": peak,
                      "kept": int(made.copies_B.sum()), "bytes_a_row": kind.itemsize}))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
