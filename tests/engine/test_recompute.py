"""Activations computed twice: the gradients of every setting are those of none, for all that may sit in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench.allocated import Allocated
from torch import Tensor, nn

from engine import rig
from luthier.contracts.batch import Batch
from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.engine import checkpoint
from luthier.engine.journal import metric_rows
from luthier.engine.modes import train_mode
from luthier.methods.dora import DoRA
from luthier.methods.full import Full
from luthier.methods.houlsby import Houlsby
from luthier.methods.lora import LoRA
from luthier.methods.loreft import LoReFT
from luthier.methods.molora import MoLoRA
from luthier.methods.p_tuning_v2 import PTuningV2
from luthier.methods.prefix import PrefixTuning
from luthier.methods.prompt import PromptTuning
from luthier.methods.unipelt import UniPELT
from luthier.models.probe import open_trunk, probe_batch
from luthier.models.quantise import quantise
from luthier.models.recompute import Recomputed
from luthier.models.trunk import Trunk, TrunkFacts
from models import sweep
from models.test_last_layer import answers
from tiny import VOCABULARY, tiny
from tiny_families import family

SAID: list[Any] = [True, 2, 3, "attention", "mlp"]
METHODS: dict[str, Method] = {
    "lora": LoRA(r=4, lora_dropout=0.2, init_lora_weights=False), "full": Full(),
    "dora": DoRA(r=4, lora_dropout=0.2, init_lora_weights=False), "prefix": PrefixTuning(num_virtual_tokens=3),
    "p_tuning_v2": PTuningV2(num_virtual_tokens=2), "prompt": PromptTuning(num_virtual_tokens=3),
    "houlsby": Houlsby(), "loreft": LoReFT(r=2), "molora": MoLoRA(r=2), "unipelt": UniPELT(),
}  # fmt: skip
BY_DAY = [("lora", "nf4", "scored rows"), ("lora", "dense", "whole"),
          *[(name, "dense", "scored rows") for name in ("full", "dora", "prefix", "prompt", "molora")]]  # fmt: skip
DEEP = {"num_hidden_layers": 3}


def gradients(trunk: Trunk, batch: Batch, linear: bool) -> dict[str, Tensor]:
    torch.manual_seed(7)
    model = trunk.model
    model.zero_grad()
    logprobs_N = trunk.logprobs(batch, batch.weights_N if linear else None)
    logprobs_N.dot(batch.weights_N).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logprobs": logprobs_N.detach(), **found}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert (found[name] - right).abs().max() <= 1e-6 * max(1.0, float(right.abs().max())), name


def calls(model: nn.Module, *ends: str) -> tuple[dict[str, int], list[Any]]:
    """Name -> how often it ran, filled by hooks."""
    seen: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith(ends):
            hooks.append(module.register_forward_pre_hook(
                lambda m, args, name=name: seen.update({name: seen.get(name, 0) + 1})
            ))  # fmt: skip
    return seen, hooks


@pytest.mark.parametrize(("name", "stored", "last_layer"), [
    pytest.param(name, stored, last_layer, marks=[] if (name, stored, last_layer) in BY_DAY else pytest.mark.nightly)
    for name in METHODS for stored in ("dense", "nf4") for last_layer in ("whole", "scored rows")
    if (name, stored) != ("full", "nf4")  # a packed base does not train
])  # fmt: skip
def test_gradients_are_those_of_kept_activations(name: str, stored: str, last_layer: str) -> None:
    """Dropout included; one setting after the other on one model, so that each is undone without a trace."""
    model = tiny("llama", **DEEP)
    if stored == "nf4":
        quantise(model, "nf4")
    METHODS[name].attach(model)
    trunk, batch = Trunk(model, TrunkFacts(last_layer=last_layer)), answers()
    model.train()
    expected = gradients(trunk, batch, linear=True)
    standing = {path for path, module in model.named_modules() if "forward" in module.__dict__}
    assert any(expected[n].abs().max() > 0 for n in expected if n != "logprobs")
    for said in SAID:
        recomputed = Recomputed(model, said)
        same(gradients(trunk, batch, linear=True), expected)
        recomputed.undo()
        assert standing == {path for path, module in model.named_modules() if "forward" in module.__dict__}
        assert not model.is_gradient_checkpointing
    same(gradients(trunk, batch, linear=True), expected)
    trunk.close()


@pytest.mark.parametrize(
    ("said", "ran"),
    [(True, "222 222"), (2, "212 212"), (3, "211 211"), ("attention", "222 111"), ("mlp", "111 222")],
)
def test_what_runs_twice(said: Any, ran: str) -> None:
    """Once in the forward pass, and again in the backward where nothing was kept; not at all without gradients."""
    model = tiny("llama", **DEEP)
    LoRA(r=2).attach(model)
    trunk = Trunk(model, TrunkFacts(fused=False))
    model.train()
    Recomputed(model, said)
    seen, _ = calls(model, "o_proj.base_layer", "act_fn")
    batch = probe_batch(VOCABULARY)
    trunk.logprobs(batch).sum().backward()
    parts = [[seen[n] for n in sorted(seen) if n.endswith(end)] for end in ("o_proj.base_layer", "act_fn")]
    assert " ".join("".join(map(str, part)) for part in parts) == ran
    seen.clear()
    with torch.no_grad():
        trunk.logprobs(batch)
    assert set(seen.values()) == {1}
    trunk.close()


def test_what_is_kept_falls_in_the_order_of_what_is_recomputed() -> None:
    model = tiny("llama", num_hidden_layers=6, intermediate_size=256)
    LoRA(r=2).attach(model)
    trunk = open_trunk(model)
    model.train()
    batch, peaks = probe_batch(VOCABULARY, (-1,) * 6, (90,) * 6), {}
    for said in (False, 3, 2, "attention", "mlp", True):
        recomputed = Recomputed(model, said) if said else None
        with Allocated() as seen:
            trunk.logprobs(batch, batch.weights_N).dot(batch.weights_N).backward()
        peaks[said] = seen.peak
        if recomputed is not None:
            recomputed.undo()
    assert peaks[False] > peaks[3] > peaks[2] > peaks[True]
    assert peaks[False] > max(peaks["attention"], peaks["mlp"])
    assert peaks[True] < 0.4 * peaks[False]
    assert peaks["mlp"] < 0.75 * peaks[False]


def test_an_adapter_on_the_experts_of_a_router() -> None:
    model = tiny("qwen3_moe")
    LoRA(r=4, init_lora_weights=False).attach(model)
    trunk, batch = open_trunk(model), probe_batch(VOCABULARY)
    model.train()
    expected = gradients(trunk, batch, linear=False)
    for said in SAID:
        recomputed = Recomputed(model, said)
        same(gradients(trunk, batch, linear=False), expected)
        recomputed.undo()


@pytest.mark.parametrize(
    ("name", "said"),
    [("prefix", True), ("prefix", "attention"), ("prefix", "mlp"), ("prompt", "attention"), ("lora", 2)],
)
def test_rows_on_the_models_own_attention(name: str, said: Any) -> None:
    """A prefix is a cache there, which must not be written twice: those passes keep what they need."""
    model = tiny("llama")
    METHODS[name].attach(model)
    trunk, batch = open_trunk(model, attention="unpacked"), probe_batch(VOCABULARY)
    model.train()
    expected = gradients(trunk, batch, linear=False)
    Recomputed(model, said)
    same(gradients(trunk, batch, linear=False), expected)


@pytest.mark.parametrize("said", SAID)
def test_without_dropout_parts_are_still_recomputed(said: Any) -> None:
    """As preference objectives train: eval mode but for what needs the other to recompute."""
    model = tiny("llama", **DEEP)
    LoRA(r=2, lora_dropout=0.5).attach(model)
    trunk, batch = open_trunk(model), probe_batch(VOCABULARY)
    train_mode(model, dropout=False)
    expected = gradients(trunk, batch, linear=False)
    Recomputed(model, said)
    train_mode(model, dropout=False)
    seen, _ = calls(model, "o_proj.delta", "gate_proj.delta")
    same(gradients(trunk, batch, linear=False), expected)
    again = {name.split(".")[4] for name, count in seen.items() if count == 2}
    assert again == {"attention": {"o_proj"}, "mlp": {"gate_proj"}}.get(str(said), {"o_proj", "gate_proj"})


# ------------------------------------------------------------------ families


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss", "deepseek_v3", "llama4", "cohere", "granite",
                                  "mistral", "gpt2", "qwen2"])  # fmt: skip
def test_families_that_are_hard_in_one_way_each(name: str) -> None:
    model = tiny(name) if name in ("gpt2", "qwen2") else family(name)
    Full().attach(model)
    trunk, batch = open_trunk(model), answers()
    model.train()
    expected = gradients(trunk, batch, linear=False)
    for said in SAID:
        recomputed = Recomputed(model, said)
        same(gradients(trunk, batch, linear=False), expected)
        recomputed.undo()


@pytest.mark.parametrize("said", [True, 2, "attention", "mlp"])
def test_a_family_without_such_a_place_says_so_in_one_line(said: Any) -> None:
    """Mamba has no attention; a family without the switch has none of the others either."""
    model = sweep.build("mamba") if isinstance(said, str) else tiny("llama")
    if not isinstance(said, str):
        type(model).supports_gradient_checkpointing = False
    try:
        with pytest.raises(RecipeError, match=r"engine\.checkpoint_activations") as caught:
            Recomputed(model, said)
    finally:
        if not isinstance(said, str):
            type(model).supports_gradient_checkpointing = True
    assert "\n" not in caught.value.line()
    assert not any("luthier_recomputed" in vars(module) for module in model.modules())


# ------------------------------------------------------------------ in a run


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    directory = tmp_path_factory.mktemp("kept")
    rig.run_through(directory, checkpoint_activations=False, steps=3, evaluation=0)
    return [float(row["loss"]) for row in metric_rows(directory / "journal.jsonl") if row["event"] == "step"]


@pytest.mark.parametrize("said", [True, pytest.param(2, marks=pytest.mark.nightly), "attention"])
def test_a_run_gives_the_same_losses_and_leaves_the_model_as_it_was(
    said: Any, kept: list[float], tmp_path: Path
) -> None:
    run = rig.build(tmp_path, checkpoint_activations=said, steps=3, evaluation=0)
    list(rig.train(run))
    assert [
        float(row["loss"]) for row in metric_rows(tmp_path / "journal.jsonl") if row["event"] == "step"
    ] == pytest.approx(kept, rel=1e-6)
    model = run.trunk.model
    assert not model.is_gradient_checkpointing
    assert not any("luthier_recomputed" in vars(module) for module in model.modules())
    assert checkpoint.load(tmp_path / "checkpoint-3").state["train"]["recompute"] == (said is True)
