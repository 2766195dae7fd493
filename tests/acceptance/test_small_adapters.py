"""Methods with state or frozen tensors of their own, as a person runs them: train, stop, go on, load, merge.

What goes on from a checkpoint ends bit for bit where the unbroken run ends: importance averages and masks, a shared
pair, factors of a decomposition are all in the checkpoint or drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

METHODS = {
    "adalora": "{name: adalora, init_r: 4, target_r: 2, lora_alpha: 16}",
    "vera": "{name: vera, r: 16}",
    "vera from its key": "{name: vera, r: 16, save_projection: false}",
    "lora_xs": "{name: lora_xs, r: 4}",
    "ia3": "ia3",
}


@pytest.mark.parametrize("name", METHODS)
def test_train_resume_load_and_merge(name: str, luthier: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace("{name: lora, r: 4}", METHODS[name]).replace("save_every: 2", "save_every: 3")
    recipe.write_text(text)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    said = luthier("train", recipe, f"output_dir={whole}", "--progress", "off")
    assert said.code == 0, said.err
    said = luthier("train", recipe, f"output_dir={parted}", "--progress", "off", "--resume", whole / "checkpoint-3")
    assert said.code == 0, said.err
    for file in ("weights", "optimizer"):
        one, two = (load_file(run / f"checkpoint-6/{file}.safetensors") for run in (whole, parted))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    same = [(run / "adapter/adapter_model.safetensors").read_bytes() for run in (whole, parted)]
    assert same[0] == same[1]
    pairs = [key for key in load_file(whole / "checkpoint-6/weights.safetensors") if key.endswith("vera_A")]
    assert len(pairs) == (name == "vera")
    said = luthier("merge", whole / "adapter", "--out", tmp_path / "merged")
    assert said.code == 0, said.err
    assert (tmp_path / "merged/model.safetensors").is_file()
