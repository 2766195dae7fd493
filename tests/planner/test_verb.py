"""`luthier plan`: recipe and rows in, page and JSON twin out; what does not fit; a run's prediction beside its peak."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.cli.main import main
from luthier.contracts.errors import UsageError
from luthier.planner import calibration, fit
from luthier.planner.page import lines
from luthier.planning import Asked, plan
from planner.rig import LLAMA_8B, SMALL, recipe
from tiny import tiny, tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A calibration file of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "luthier" / "plan" / "calibration.jsonl"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A recipe with a tiny model and rows."""
    tiny().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{n} and", "completion": f" {n + 1}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {tmp_path / 'model'}\ndata: {{train: {tmp_path / 'rows.jsonl'}, max_tokens: 64}}\n"
        "method: {name: lora, r: 8}\n"
        f"train: {{max_steps: 2, tokens_per_step: 256}}\nengine: {{device: cpu}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    return file


def asked(**more: Any) -> Asked:
    return Asked(**{"device": "rtx-4090", "words": LLAMA_8B, **more})


def test_page_and_json_say_the_same(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(written), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["plan", str(written)]) == 0
    page = capsys.readouterr().out
    assert told["course"]["from_rows"] and told["course"]["steps"] == 2
    assert sum(told["memory"]["terms"].values()) == told["memory"]["peak_bytes"]
    assert told["time"]["estimate"] and told["time"]["measured"] and told["time"]["tokens_per_second"] > 0
    for name in told["memory"]["terms"]:
        assert f"  {name} " in page
    assert "peak" in page and "time (estimate)" in page and f"{told['model']['trainable']:,}" in page


def test_a_config_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str], written: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_8B))
    words = [
        "plan",
        str(written),
        "method.r=16",
        "--config",
        str(config),
        "--device",
        "h100-80gb",
        "--json",
        "--devices",
    ]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"]["trainable"] == 41_943_040 and told["model"]["parameters"] == 8_030_261_248
    assert set(told["time"]["devices"]) >= {"t4", "h200"} and told["time"]["devices"]["t4"]["verdict"] == "does not fit"
    assert any("not measured on a GPU" in note for note in told["notes"])
    assert told["memory"]["terms"]["weights"] == 2 * 8_030_261_248


def test_fit_proposes_what_fits() -> None:
    told = plan(recipe(data={"train": "x", "max_tokens": 2048}), asked(fit="12GB"))["fit"]
    assert not told["fits"] and told["fits_with"] and told["together_needs_bytes"] <= 12e9
    assert 0 < len(told["best"]) <= 3 and "model.quantization=nf4" in told["together"]
    savings = [one["saves_bytes"] for one in told["best"]]
    assert savings == sorted(savings, reverse=True) and savings[-1] > 0
    assert plan(recipe(), asked(fit="120GB"))["fit"] == {"room_bytes": 120_000_000_000, "fits": True}


def test_a_full_training_is_told_to_take_an_adapter() -> None:
    told = plan(recipe("full", data={"train": "x", "max_tokens": 512}), asked(fit="24GB"))["fit"]
    assert told["best"][0]["override"] == "method.name=lora" and told["fits_with"]


def test_sharing_stands_beside_the_plan() -> None:
    told = plan(recipe("full"), asked(gpus=8))
    held = {one["way"]: one["device_bytes"] for one in told["layout"]}
    parameters = told["model"]["parameters"]
    assert held["ddp"] == 16 * parameters and held["zero3"] == 2 * parameters
    assert any("states on each of 8 GPUs" in line for line in lines(told))


def test_nothing_fits_is_exit_5(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(written), "--fit", "1MB"]) == 5
    seen = capsys.readouterr()
    assert (
        seen.err.startswith("resources: nothing that a recipe can change makes this fit") and "nothing fits" in seen.out
    )
    assert seen.err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["plan"], ["plan", "--preset", "no"], ["plan", "--advise", "rows"], ["plan", "x.yaml"]]
)
def test_wrong_words_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_amounts() -> None:
    assert fit.read_bytes("24GB") == 24_000_000_000 and fit.read_bytes("1.5 GiB") == 3 << 29
    assert fit.read_bytes("7") == 7
    for wrong in ("", "GB", "0GB", "12 parsecs", "-1GB"):
        with pytest.raises(UsageError, match="not an amount of memory"):
            fit.read_bytes(wrong)


def test_advice_and_presets_at_the_door(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--advise", "rows=5000", "gpu_gb=12", "pairs=yes"]) == 0
    said = capsys.readouterr().out
    assert "method: qlora" in said and "objective: dpo" in said
    assert main(["plan", "--preset", "mixed-states-7b"]) == 0
    assert "full: 112.00 GB (printed 112 GB)" in capsys.readouterr().out


def test_a_run_keeps_its_prediction(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    assert main(["train", str(written), "--progress", "off"]) == 0
    assert "memory: predicted" in capsys.readouterr().out
    run = tmp_path / "run"
    kept = json.loads((run / "report.json").read_text())["memory"]
    assert kept["predicted_peak_bytes"] == json.loads((run / "plan.json").read_text())["predicted_peak_bytes"] > 0
    assert kept["measured_peak_bytes"] > kept["predicted_peak_bytes"] and "resident" in kept["instrument"]
    assert main(["plan", str(run)]) == 0
    assert capsys.readouterr().out.strip() == kept["line"] == luthier.plan(run)["line"]
    assert not cache.exists(), "a run of a few megabytes says nothing about libraries"
    assert main(["train", str(written), "--dry-run", "--json", f"output_dir={tmp_path / 'other'}"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted_peak_bytes"] == kept["predicted_peak_bytes"]


def test_calibration_is_used_and_said(cache: Path) -> None:
    plain = plan(recipe(), Asked(device="cpu", words=SMALL))
    for more in (100, 300, 200):
        calibration.add("cpu", 1000, 1000 + more * 1_000_000)
    calibration.add("cuda", 1000, 1200)
    with cache.open("a") as file:
        file.write("torn\n")
    used = plan(recipe(), Asked(device="cpu", words=SMALL))
    assert used["memory"]["needs_bytes"] == plain["memory"]["peak_bytes"] + 200_000_000
    assert any("calibrated by 3 runs here" in note for note in used["notes"])
    assert any("unreadable" in note for note in used["notes"])
    assert any("calibrated" in line for line in lines(used))
    left = plan(recipe(), Asked(device="cpu", words=SMALL, calibrated=False))
    assert left["memory"] == plain["memory"] and left["notes"] == plain["notes"]
    found = calibration.read("cuda")
    assert found is not None and found.factor == 1.2 and found.unread == 1
