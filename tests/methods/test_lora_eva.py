"""EVA: the start from the training rows, against PEFT's, and what its look leaves on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.methods.dora import DoRA
from luthier.methods.lora import LoRA
from luthier.models.peft_names import live
from luthier.models.sites import sites
from methods.rig import base, logits, train
from tiny import VOCABULARY

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def attached(family: str = "llama", kind: type[LoRA] = LoRA, **fields: Any) -> tuple[LoRA, nn.Module]:
    model = base(family)
    torch.manual_seed(0)
    method = kind(**{"r": 4, "lora_alpha": 6, "init_lora_weights": "eva", **fields})
    method.attach(model)
    return method, model


def rows(count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, VOCABULARY, (4, 24), generator=generator) for _ in range(count)]


def passes(model: nn.Module, count: int = 8) -> Iterator[Callable[[], None]]:
    for batch in rows(count):

        def run(batch: torch.Tensor = batch) -> None:
            logits(model, batch)

        yield run


def test_eva_is_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions and ranks on a trained model, in layers that read different tensors; both sides decompose exactly."""
    from peft.tuners.lora import eva

    exact = eva.IncrementalPCA
    monkeypatch.setattr(eva, "IncrementalPCA", lambda **options: exact(**{**options, "lowrank": False}))
    targets = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets, init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, use_label_mask=False),
    )  # fmt: skip
    oracle = peft.get_peft_model(base("stories"), config)
    data = [{"input_ids": batch} for batch in rows(60)]
    eva.initialize_lora_eva_weights(oracle, data, show_progress_bar=False)
    method, model = attached("stories", target_modules=tuple(targets))
    method.look(model, passes(model, 60))
    right = peft.get_peft_model_state_dict(oracle)
    mine = method.tensors(model)
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in right.items()}
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, right[name], atol=2e-3, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}")
    written, theirs = method.config(model), oracle.peft_config["default"]
    assert written["rank_pattern"] == theirs.rank_pattern
    assert written["alpha_pattern"] == pytest.approx(theirs.alpha_pattern)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_eva_deals_out_the_same_budget(family: str, kind: type[LoRA], tmp_path: Path) -> None:
    method, model = attached(family, kind)
    before = sum(site.delta.rank for site in sites(model))
    count = len(sites(model))
    assert method.looks_at_rows and not LoRA().looks_at_rows
    untouched = logits(base(family))
    method.look(model, passes(model))
    assert torch.equal(logits(model), untouched)
    ranks = [site.delta.rank for site in sites(model)]
    assert sum(ranks) == before
    assert max(ranks) <= 8 and len(set(ranks)) > 1
    assert {site.delta.scale for site in sites(model)} == {1.5}
    assert {id(site) for site in sites(model)} == {id(one) for site in sites(model) for one in site.shared.sites}
    for site in sites(model):
        a = site.delta.lora_A.detach()
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-4, rtol=0)
    train(method, model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    again = base(family)
    load_adapter(tmp_path / "a", again)
    assert torch.equal(logits(again), logits(model))
    assert len(sites(again)) == len(sites(model)) <= count
    oracle = peft.PeftModel.from_pretrained(base(family), tmp_path / "a")
    torch.testing.assert_close(logits(oracle), logits(model), atol=1e-5, rtol=1e-4)


def test_eva_looks_the_same_way_twice() -> None:
    made = []
    for seed in (0, 1):
        model = base("llama")
        torch.manual_seed(seed)
        method = LoRA(r=4, init_lora_weights="eva")
        method.attach(model)
        method.look(model, passes(model))
        made.append(live(model))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_eva_without_redistribution_keeps_ranks_and_small_batches_wait() -> None:
    method, model = attached(eva_rho=1.0)

    def one_token() -> Iterator[Callable[[], None]]:
        for token in range(12):
            yield lambda token=token: logits(model, torch.tensor([[token]]))

    method.look(model, one_token())
    assert {site.delta.rank for site in sites(model)} == {4}
    a = next(iter(sites(model))).delta.lora_A.detach()
    torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-4, rtol=0)


def test_eva_stops_when_all_is_settled() -> None:
    method, model = attached(target_modules=("q_proj",))
    counted = []

    def endless() -> Iterator[Callable[[], None]]:
        while True:
            counted.append(1)
            yield lambda: logits(model, rows(1)[0])

    method.look(model, endless())
    assert 2 < len(counted) < 20
