"""Embedding and head under a packed base: as wide as the files have them, counted as the loader leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.methods.lora import LoRA
from luthier.models.load import load_model, save_whole
from luthier.models.weights.narrow import narrow_tables
from luthier.planned import plan_of
from luthier.planner.load import assumed
from luthier.planner.memory import base_bytes
from luthier.recipe.recipe import ModelSection, Recipe
from tiny import tiny, tiny_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_plan_counts_what_the_loader_leaves(family: str, dtype: Any, tmp_path: Path) -> None:
    save_whole(tiny(family).to(dtype), tiny_tokenizer(), None, tmp_path / "m")
    section = ModelSection(path=str(tmp_path / "m"), quantization="nf4")
    model = load_model(section, dtype=torch.float32, device=torch.device("cpu")).model
    narrow_tables(model)
    tensors = [
        *{id(p): p for p in model.parameters()}.values(),
        *(b for n, b in model.named_buffers() if "absmax" in n),
    ]
    recipe = Recipe(model=section.model_dump(), data="x.jsonl", method=LoRA())
    planned = plan_of(recipe, assumed(64, 64, 64, 1.0, 1), "cpu")
    found = base_bytes(planned.shape, planned.trained, planned.setting)
    assert found == pytest.approx(sum(t.numel() * t.element_size() for t in tensors), rel=0.01)
    assert planned.setting.stored.tables == (2 if dtype == torch.bfloat16 else 4)
