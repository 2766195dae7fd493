"""Every bench runs, small, in this process: its parts fit, its result is whole, its losses agree; times say nothing."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

TINY = ("--model", "tiny", "--steps", "1", "--rows-per-step", "4", "--longest", "64", "--threads", "1")


def run(bench: str, out: Path, *more: str, base: tuple[str, ...] = TINY) -> dict[str, Any]:
    """The JSON files that a bench wrote, by name."""
    import_module(f"bench.{bench}").main([*base, "--out", str(out), *more])
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in out.glob("*.json")}
    assert found and all((out / f"{name}.md").read_text("utf-8").startswith("# ") for name in found)
    return found


@pytest.mark.parametrize("bench", ["sft", "full"])
def test_fine_tuning(bench: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = run(bench, tmp_path, "--one-process", "--systems", "luthier", "bare")[f"{bench}-tiny"]
    bare = result["systems"]["bare"]
    assert bare["loss_difference"] < 1e-5 and bare["tensor_difference"] < 1e-4
    assert result["systems"]["luthier"]["share_of_gemm_peak"] > 0


def test_profile_puts_every_op_somewhere(tmp_path: Path) -> None:
    methods = run("profile", tmp_path)["profile-tiny"]["methods"]
    for shares in (methods["lora"]["shares"], methods["full"]["shares"]):
        assert sum(shares.values()) == pytest.approx(1.0)
        assert all(shares[name] > 0 for name in ("base", "attention", "head", "optimizer", "elementwise"))
    assert methods["lora"]["shares"]["adapter"] > 0 == methods["full"]["shares"]["adapter"]
