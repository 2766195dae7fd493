"""A program of its own: loads models under a hard limit of memory, and says in JSON what each load could do with.

The kernel refuses every byte of private memory above RLIMIT_DATA, so a load that comes through never had more: no
sampling, and nothing that any library allocates goes unseen. Mapped files count in full while they are mapped, and
their size is known. `python load_under_limit.py DIRECTORY QUANTIZATION DTYPE LIMIT_BYTES FILE_BYTES ...` (again and
again: five words a load); one line of JSON for each: {"loaded": ..., "stored": bytes, "kept": bytes}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
from pathlib import Path

import torch

from luthier.models.load import load_model
from luthier.recipe.recipe import ModelSection


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024


def load(directory: str, name: str, dtype: str) -> torch.nn.Module:
    section = ModelSection(path=directory, quantization=name)
    return load_model(section, dtype=getattr(torch, dtype)).model


def limited(directory: str, name: str, dtype: str, limit: int, mapped: int) -> dict[str, object]:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = private_bytes()
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (before + limit + mapped, hard))
    try:
        model = load(directory, name, dtype)
    except Exception as error:  # noqa: BLE001 (whatever a library makes of memory that it does not get)
        return {"loaded": False, "error": str(error)[:200]}
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    stored = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return {"loaded": True, "stored": stored, "kept": private_bytes() - before}


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    warm, *rest = words
    for name in ("nf4", "int8", "none"):  # what is imported and kept once and for all
        load(warm, name, "float32")
    for first in range(0, len(rest), 5):
        directory, name, dtype, limit, mapped = rest[first : first + 5]
        print(json.dumps(limited(directory, name, dtype, int(limit), int(mapped))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
