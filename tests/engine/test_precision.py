"""Number formats of a run: what is stored as what, sums that lose nothing, and gradients that no loss scale changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from engine import rig
from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.assembly import assemble
from luthier.contracts.errors import CheckpointError, RecipeError
from luthier.contracts.event import StepDone
from luthier.contracts.method import trains
from luthier.contracts.objective import Loss
from luthier.data.collate import collate
from luthier.data.stream import Stream, StreamSpec
from luthier.engine import checkpoint
from luthier.engine.precision import resolve_precision, settle
from luthier.engine.reference import MethodOff
from luthier.engine.scoring import Scorer
from luthier.engine.state import load_trained, trained_tensors
from luthier.engine.strategy.single import Single
from luthier.methods.lora import LoRA
from luthier.models.load import save_whole
from luthier.models.probe import open_trunk
from luthier.models.trunk import Trunk, TrunkFacts
from luthier.recipe import resolve
from luthier.recipe.recipe import Recipe
from methods.rig import stir
from objectives.rig import rows
from tiny import tiny, tiny_tokenizer

CPU = torch.device("cpu")
BF16: dict[str, Any] = {"precision": "bf16", "trained": "bfloat16"}


# ------------------------------------------------------------------ words


def test_what_the_recipe_says_is_what_is_computed() -> None:
    assert resolve_precision("auto", CPU).compute == torch.float32
    assert resolve_precision("fp16", CPU).frozen == torch.float16
    assert resolve_precision("fp16", CPU).trained == torch.float32
    assert [resolve_precision(name, CPU).scales_loss for name in ("fp32", "bf16", "fp16")] == [False, False, True]
    assert resolve_precision("auto", CPU, "bfloat16") == resolve_precision("bf16", CPU, "bfloat16")


@pytest.mark.parametrize(
    ("name", "trained", "words"),
    [("fp8", "auto", r"engine\.precision"), ("fp32", "bfloat16", r"engine\.precision: bf16"),
     ("fp16", "bfloat16", r"engine\.precision: bf16"), ("auto", "int4", r"engine\.trained_dtype")],
)  # fmt: skip
def test_what_cannot_be_is_one_line(name: str, trained: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        resolve_precision(name, CPU, trained)


# ------------------------------------------------------------------ weights in bfloat16


def test_matrices_are_narrow_and_what_is_small_or_delicate_is_not() -> None:
    model = tiny("llama")
    resolve.load("methods", "molora")().attach(model)
    settle(model, resolve_precision("bf16", CPU, "bfloat16"))
    found = {name: p.dtype for name, p in model.named_parameters() if trains(p)}
    assert {dtype for name, dtype in found.items() if "lora_A" in name or "lora_B" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in found.items() if name.endswith("delta.weight")} == {torch.float32}, "routers"
    whole = settle(tiny("gpt2"), resolve_precision("bf16", CPU, "bfloat16"))
    assert {(p.ndim > 1, p.dtype) for p in whole.parameters()} == {(True, torch.bfloat16), (False, torch.float32)}
    frozen = settle(tiny("llama").requires_grad_(False), resolve_precision("fp16", CPU))
    assert {p.dtype for p in frozen.parameters()} == {torch.float16}


class Many(nn.Module):
    """A model of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)


def test_sums_over_microbatches_lose_nothing() -> None:
    """A large part and 512 small ones: each is less than a bfloat16 of the sum can show, together they are a half."""
    model = Many()
    strategy = Single(CPU, resolve_precision("bf16", CPU, "bfloat16"))
    strategy.place(model)
    strategy.bind(torch.optim.SGD([model.table.weight], lr=0.0))
    parts = [1.0] + [2.0**-10] * 512

    def loss(part: Any) -> Loss:
        return Loss((model.table(torch.tensor([1])).sum() * part.value).float(), {})

    batches: Any = [Part(value) for value in parts]
    strategy.forward_backward(batches, loss, 1.0)
    grad = model.table.weight.grad
    assert model.table.weight.dtype == torch.bfloat16
    assert grad is not None
    assert grad.dtype == torch.float32
    assert torch.equal(grad[1], torch.full((3,), 1.5))
    lost = torch.zeros((), dtype=torch.bfloat16)
    for value in parts:
        lost += value
    assert float(lost) == 1.0, "what bfloat16 would have made of it"


class Part(float):
    """A number that travels as a batch does."""

    @property
    def value(self) -> float:
        return float(self)

    def to(self, device: torch.device) -> Part:
        return self


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.nightly)])
def test_a_run_in_bfloat16_resumes_bit_equal_and_keeps_its_dtype(tmp_path: Path, method: str) -> None:
    options = {**BF16, "method": method, "evaluation": 0, "steps": 4, "save_every": 2, "learning_rate": 1e-3,
               "tokens_per_step": 80}  # fmt: skip
    rig.run_through(tmp_path / "whole", **options)
    for event in rig.train(rig.build(tmp_path / "broken", **options)):
        if event.event == "step" and event.step == 3:
            break
    rig.run_through(tmp_path / "broken", resume="auto", **options)
    assert rig.final_digests(tmp_path / "broken", 4) == rig.final_digests(tmp_path / "whole", 4)
    saved = checkpoint.load(tmp_path / "whole/checkpoint-4")
    assert {tensor.dtype for tensor in saved.weights.values() if tensor.ndim > 1} == {torch.bfloat16}
    assert torch.bfloat16 not in {tensor.dtype for tensor in saved.optimizer.values()}
    with pytest.raises(CheckpointError, match=r"engine\.trained_dtype differs"):
        rig.run_through(tmp_path / "broken", resume="auto", **{**options, "trained": "float32"})


def test_updates_in_backward_are_the_same_in_bfloat16(tmp_path: Path) -> None:
    """To the bit: the gradient is float32 there too, and chance is the parameter's own."""
    ends = []
    for on in (False, True):
        run = rig.build(tmp_path / str(on), **BF16, steps=3, evaluation=0, in_backward=on, max_grad_norm=0.0,
                        tokens_per_step=80, microbatch_tokens=40)  # fmt: skip
        list(rig.train(run))
        ends.append({name: p.detach().clone() for name, p in run.trunk.model.named_parameters() if trains(p)})
    assert {tensor.dtype for tensor in ends[0].values()} == {torch.bfloat16}
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_weights_in_bfloat16_learn_as_float32_ones_do(tmp_path: Path) -> None:
    ends = {}
    for trained in ("float32", "bfloat16"):
        run = rig.build(
            tmp_path / trained, precision="bf16", trained=trained, steps=5, evaluation=0, tokens_per_step=80
        )
        ends[trained] = [event.loss for event in rig.train(run) if isinstance(event, StepDone)]
    assert ends["bfloat16"] == pytest.approx(ends["float32"], abs=2e-2)
    assert ends["bfloat16"][-1] < ends["bfloat16"][0]


def test_adapters_are_written_in_their_own_dtype_and_come_back(tmp_path: Path) -> None:
    model, method = tiny("llama"), LoRA(r=4)
    method.attach(model)
    settle(model, resolve_precision("bf16", CPU, "bfloat16"))
    stir(model, 0.05)
    save_adapter(tmp_path / "adapter", method, model, base_path="tiny")
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    again = tiny("llama")
    loaded = load_adapter(tmp_path / "adapter", again)
    for (name, one), (_, two) in zip(method.tensors(model).items(), loaded.tensors(again).items(), strict=True):
        assert torch.equal(one.float(), two.float()), name


def test_a_checkpoint_of_another_dtype_is_refused() -> None:
    model = settle(tiny("llama"), resolve_precision("bf16", CPU, "bfloat16"))
    wide = {name: tensor.float() for name, tensor in trained_tensors(model).items()}
    with pytest.raises(CheckpointError, match=r"float32 .* in the checkpoint"):
        load_trained(model, wide)


# ------------------------------------------------------------------ scales


@cache
def facts() -> TrunkFacts:
    trunk = open_trunk(tiny("llama"))
    trunk.close()
    return trunk.facts


def gradients(name: str, objective: str, precision: str, scale: float) -> dict[str, Tensor]:
    """Of one step in two microbatches, with the method's penalty, as the strategy hands them to the optimizer."""
    model, method, aim = tiny("llama"), resolve.load("methods", name)(), resolve.load("objectives", objective)()
    torch.manual_seed(0)
    method.attach(model)
    stir(model, 0.05)
    chosen, trunk = resolve_precision(precision, CPU), Trunk(model, facts())
    kind = {"sft": "Row", "kto": "Judged"}.get(objective, "Pair")
    samples = rows(kind, 4, (1.0, 0.5), aim.score_prompt)
    stream = Stream(samples, StreamSpec(rows_per_step=4, microbatch_tokens=60))
    reference = MethodOff(trunk, method, chosen) if "reference" in aim.roles else None
    scorer = Scorer(trunk, aim, CPU, chosen, reference)
    strategy = Single(CPU, chosen)
    strategy.place(model)
    strategy.bind(torch.optim.SGD([{"params": [p for p in model.parameters() if trains(p)]}], lr=0.0))
    strategy.loss_scale = scale
    microbatches = [collate(samples[:2]), collate(samples[2:])]
    method.begin_step(model, microbatches)
    weight = sum(aim.weight(batch) for batch in microbatches)
    stats = scorer.statistics(microbatches, samples, stream)
    strategy.forward_backward(microbatches, lambda batch: scorer.loss(batch, stats), weight)
    strategy.backward(method.penalty(model))
    strategy.clip(0.0)
    strategy.release()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Relative distance of the tensor that is furthest off, of those that are more than rounding."""
    assert one.keys() == two.keys()
    whole = torch.stack([grad.norm() for grad in two.values()]).norm()
    return max(float((one[n] - g).norm() / g.norm()) for n, g in two.items() if g.norm() > 1e-4 * whole)


PAIRS = [("full", "sft"), ("full", "orpo"), ("lora", "dpo"), ("adalora", "kto"), ("molora", "orpo")]


@pytest.mark.parametrize(("method", "objective"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_gradients_know_nothing_of_the_scale(method: str, objective: str) -> None:
    """fp16 at 2^16 is fp16 at 2^8 to float16's rounding, and both are float32's; penalties and router terms too."""
    exact = gradients(method, objective, "fp32", 1.0)
    high, low = (gradients(method, objective, "fp16", scale) for scale in (2.0**14, 2.0**8))
    assert apart(high, exact) < 2e-2
    assert apart(high, low) < 2e-2


def test_a_scale_saves_gradients_below_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss a hundred thousand times smaller: at scale 1 most of its gradient is zero, at 2^16 it is whole."""
    whole = Scorer.loss

    def small(self: Scorer, batch: Any, stats: Any) -> Loss:
        found = whole(self, batch, stats)
        return Loss(found.total * 1e-5, found.metrics)

    monkeypatch.setattr(Scorer, "loss", small)
    exact = gradients("lora", "sft", "fp32", 1.0)
    assert apart(gradients("lora", "sft", "fp16", 2.0**16), exact) < 2e-2
    assert apart(gradients("lora", "sft", "fp16", 1.0), exact) > 1e-1


# ------------------------------------------------------------------ the recipe's other word for it


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [({}, {"float32"}), ({"engine.precision": "bf16"}, {"bfloat16"}),
     ({"engine.trained_dtype": "bfloat16"}, {"bfloat16"})],
)  # fmt: skip
def test_adapter_dtype_is_a_word_for_what_trains(
    recipe: dict[str, str], dtype: set[str], assembled: Callable[..., Any]
) -> None:
    """Where products are bfloat16; elsewhere a note says that it stays float32."""
    work = assembled({"method.adapter_dtype": "bf16", **recipe})
    found = {str(p.dtype).removeprefix("torch.") for p in work.loaded.model.parameters() if trains(p)}
    assert found == dtype
    assert any("adapter_dtype bf16 needs" in note for note in work.notes) == (dtype == {"float32"})


def test_adapter_dtype_against_trained_dtype_is_one_line(assembled: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match="contradict each other"):
        assembled({"method.adapter_dtype": "bf16", "engine.trained_dtype": "float32"})


@pytest.fixture
def assembled(tmp_path: Path) -> Callable[..., Any]:
    """A recipe on a tiny model, as far as the run."""
    tokenizer = tiny_tokenizer()
    base = save_whole(tiny("llama"), tokenizer, str(tokenizer.chat_template), tmp_path / "base")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {index}"}) + "\n" for index in range(8)))

    def make(words: dict[str, str]) -> Any:
        tree: dict[str, Any] = {"model": str(base), "data": str(path), "method": {"name": "lora", "r": 4}}
        for dotted, value in words.items():
            section, _, field = dotted.partition(".")
            tree.setdefault(section, {})[field] = value
        return assemble(Recipe(**tree, output_dir=str(tmp_path / "run")))

    return make
