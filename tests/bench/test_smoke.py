"""Every bench runs, small, in this process: its parts fit, its result is whole, its losses agree; times say nothing."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bench import search

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


@pytest.mark.parametrize("part", ["dpo-each", "dpo-cached"])
def test_preferences(part: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    small = ("--rows-per-step", "2", "--longest", "128")
    result = run("dpo", tmp_path, *small, "--one-process", "--systems", "luthier", "bare", "--parts", part)[part]
    bare = result["systems"]["bare"]
    assert bare["loss_difference"] < 1e-5 and bare["tensor_difference"] < 1e-4


def test_a_shared_prompt_gives_the_same_gradients(tmp_path: Path) -> None:
    shares = run("dpo", tmp_path, "--rows-per-step", "2", "--parts", "sharing")["sharing"]["shares"]
    for one in shares.values():
        assert one["gradient_difference"] < 1e-5 and one["loss_difference"] < 1e-5
        assert one["tokens"]["shared"] < one["tokens"]["apart"]


def test_memory_fills_every_cell(tmp_path: Path) -> None:
    small = ("--models", "tiny", "--tokens", "64", "--systems", "luthier", "bare", "--one-process")
    cells = run("memory", tmp_path, *small)["memory"]["cells"]
    found = {(cell["method"], cell["system"]): cell for cell in cells}
    assert len(found) == len(cells) == 4
    for method in ("lora", "full"):
        assert found[method, "luthier"]["losses"] == pytest.approx(found[method, "bare"]["losses"], abs=1e-5)


def test_low_memory_follows_every_system(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    small = ("--one-process", "--held-only", "--systems", "luthier", "luthier_nf4", "trl_second")
    held = run("low_memory", tmp_path, *small)["low_memory"]["held"]
    dense, packed, trl = held["luthier"], held["luthier_nf4"], held["trl_second"]
    assert trl["losses"] == pytest.approx(dense["losses"], abs=1e-5) and packed["losses"] != dense["losses"]
    assert trl["weights"] >= dense["weights"] > packed["weights"] and trl["above"] > dense["above"] > 0


def test_scale_holds_no_more_than_planned(tmp_path: Path) -> None:
    result = run("scale", tmp_path)["scale"]
    assert all(0 < point["held_bytes"] <= point["planned_bytes"] for point in result["points"])
    assert (
        result["fits"]["vocabulary"]["held_growth_bytes"] <= 1.02 * result["fits"]["vocabulary"]["chunk_growth_bytes"]
    )


def test_plan_predicts_what_is_measured(tmp_path: Path) -> None:
    small = ("--models", "tiny", "--tokens", "128", "--methods", "lora", "full")
    cells = run("plan", tmp_path, *small)["plan"]["cells"]
    assert len(cells) == 4
    assert all(abs(cell["predicted_bytes"] / cell["measured_bytes"] - 1) < 0.1 for cell in cells)


@pytest.mark.nightly
def test_curves_overlay(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    methods = run("curves", tmp_path, "--steps", "3", "--one-process")["curves"]["methods"]
    assert methods.keys() == {"lora", "full"}
    assert all(told["largest_difference"] < 1e-5 and len(told["losses"]["trl"]) == 4 for told in methods.values())


def test_gpu_bench_runs_small_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    result = run("gpu", tmp_path, "--smoke", "--steps", "1", "--threads", "1", base=())["gpu"]
    assert result["systems"]["trl_best"]["loss_difference"] < 1e-4
    assert sum(result["useful_tokens"]) == 2 * 256 and result["systems"]["luthier"]["mfu"] > 0


def test_quality_scores_both_by_one_judge(tmp_path: Path, shared_data: Any) -> None:
    pytest.importorskip("trl")
    shared_data("models/stories260K-chatml")
    small = ("--tasks", "gsm8k", "--seeds", "1", "--small", "20", "--one-process", "--threads", "1")
    task = run("quality", tmp_path, *small, base=())["quality"]["tasks"]["gsm8k"]
    assert all(score < task["base_score"] for scores in task["scores"].values() for score in scores)


@pytest.mark.nightly
def test_search_records_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    few = {name: search.CANDIDATES[name] for name in ("1 row a batch", "padding-free, sdpa")}
    monkeypatch.setattr(search, "CANDIDATES", {**few, "not to be had": ({"attention": "none such"}, {}, True)})
    tried = run("sft", tmp_path, "--search", "--one-process")["search-tiny"]["tried"]
    assert all(tried[name]["loss_difference"] < 1e-5 and tried[name]["tokens_per_second"] > 0 for name in few)
    assert "failed" in tried["not to be had"]


def test_share_of_each_work(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    few = ("--works", "sft-s32k", "dpo-each", "--only-model", "tiny", "--one-process", "--steps", "1")
    works = run("share", tmp_path, *few, "--longest", "128", "--threads", "1", base=())["share"]["works"]
    assert works.keys() == {"sft-s32k", "dpo-each"} and all(work["share"] > 0 for work in works.values())


def test_every_method_has_a_row(tmp_path: Path, shared_data: Any) -> None:
    shared_data("models/stories260K-chatml")
    small = ("--tasks", "gsm8k", "--methods", "lora", "full", "--small", "20", "--one-process", "--steps", "2")
    task = run("methods", tmp_path, *small, base=())["methods"]["tasks"]["gsm8k"]
    lora, full = task["cells"]
    assert lora["trainable"] < full["trainable"] and lora["merge"] < 1e-3 and full["merge"] == "a whole model"
    assert all(cell["held_out_loss"] < task["base_loss"] for cell in task["cells"])


def test_formats_side_by_side(tmp_path: Path) -> None:
    told = run("formats", tmp_path)["formats"]["formats"]
    assert told.keys() == {"fp32", "nf4", "nf4, scales in fp32", "int8"}
    assert told["nf4"]["weights"] < told["int8"]["weights"] < told["fp32"]["weights"]
    assert all(abs(one["losses"][0] - told["fp32"]["losses"][0]) < 0.1 for one in told.values())
