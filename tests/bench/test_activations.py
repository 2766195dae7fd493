"""The bench of recomputed activations, on a model that takes no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.page import PAGES

from bench import activations


@pytest.mark.nightly
def test_a_small_run_of_it(tmp_path: Path) -> None:
    activations.main(["--model", "tiny", "--steps", "1", "--tokens", "128", "--threads", "1", "--methods", "lora",
                      "--out", str(tmp_path)])  # fmt: skip
    result = json.loads((tmp_path / "activations-tiny.json").read_text("utf-8"))
    settings = result["methods"]["lora"]["settings"]
    assert list(settings) == ["false", "3", "2", "attention", "mlp", "true"]
    for one in settings.values():
        assert one["loss_difference"] < 1e-6
        assert one["norm_difference"] < 1e-5
        assert len(one["ratios"]) == 1
    assert settings["true"]["peak_bytes"] < settings["false"]["peak_bytes"]
    assert settings["false"]["memory_share"] == 1.0
    assert (tmp_path / "activations-tiny.md").read_text("utf-8") == PAGES["activations"](result)
