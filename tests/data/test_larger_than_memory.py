"""A set larger than the memory a process may have: packed into steps from the disk, row by row."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from luthier.data.shelf import CODES, TYPES
from luthier.data.stored import Making

ROWS, TOKENS = 4096, 1 << 14  # 256 MiB of ids, 64 MiB of weights

_CHILD = """
import resource, sys
from pathlib import Path
import numpy as np
from luthier.data.shelf import CODES, Rows, Shelf
from luthier.data.stored import opened
from luthier.data.stream import Stream, StreamSpec

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024

kept = opened(Path(sys.argv[1]))
shelf = Shelf({name: kept.arrays[name] for name in CODES}, ("a.jsonl",), (((0,), ()),))
resource.setrlimit(resource.RLIMIT_DATA, (held() + (128 << 20), -1))
stream = Stream(Rows(shelf, np.arange(len(shelf))), StreamSpec(tokens_per_step=1 << 17, window=64))
total = sum(batch.tokens for step in range(stream.steps_per_epoch) for batch in stream.step(step))
try:
    np.array(kept.arrays["tokens"])
    print("the limit did not hold")
except MemoryError:
    print(total)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is limited by RLIMIT_DATA of Linux")
def test_steps_of_a_set_that_does_not_fit(tmp_path: Path) -> None:
    making = Making(tmp_path / "set.making", {name: TYPES[code] for name, code in CODES.items()})
    for row in range(ROWS):
        columns = {name: array(code) for name, code in CODES.items()}
        columns["tokens"].frombytes(bytes(4 * TOKENS))
        columns["whole"].frombytes(b"\0" + b"\1" * (TOKENS - 1))
        for name, value in {
            "length": TOKENS,
            "parent": -1,
            "kind": 0,
            "pieces": 1,
            "file": 0,
            "line": row + 1,
            "shape": 0,
        }.items():
            columns[name].append(value)
        making.append(columns)
    making.finish()
    making.write({}, {}, {})
    making.settle(tmp_path / "set")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path / "set")], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.strip() == str(ROWS * TOKENS), done.stderr[-2000:]
