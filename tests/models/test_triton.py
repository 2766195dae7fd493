"""The Triton kernels under Triton's interpreter, in a process of their own; and that a CPU does without them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from luthier.models.kernels import gpu


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (extra: gpu)")
def test_kernels_equal_their_twins() -> None:
    file = Path(__file__).with_name("interpreted_kernels.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", str(file)], capture_output=True, text=True,
        cwd=file.parents[2], env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


def test_a_cpu_tensor_takes_no_kernel() -> None:
    said = gpu.refusal(torch.zeros(2))
    assert said in ("triton is not installed (extra: gpu)", "no Triton kernel on cpu")
