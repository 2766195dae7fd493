"""What backward needs, and what the optimizer keeps, somewhere else: the same bits, less memory here.

The somewhere else is a stand-in that torch's bookkeeping cannot see, so only the copies of a GPU are not tested here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.allocated import Allocated
from torch import Tensor, nn

import luthier
from engine import rig
from luthier.assembly import assemble
from luthier.contracts.batch import Batch
from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.engine.offload import Host, OffloadedActivations, OffloadedStates, check_offload
from luthier.engine.optimizers.adamw import AdamW
from luthier.methods.dora import DoRA
from luthier.methods.full import Full
from luthier.methods.lora import LoRA
from luthier.methods.prefix import PrefixTuning
from luthier.models.gradient_room import GradientRoom
from luthier.models.probe import open_trunk, probe_batch
from luthier.models.quantise import quantise
from luthier.models.recompute import Recomputed
from luthier.models.trunk import Trunk
from luthier.recipe.recipe import EngineSection
from tiny import VOCABULARY, tiny

METHODS: dict[str, Method] = {
    "lora": LoRA(r=4, lora_dropout=0.2, init_lora_weights=False), "full": Full(),
    "dora": DoRA(r=4, init_lora_weights=False), "prefix": PrefixTuning(num_virtual_tokens=3),
}  # fmt: skip


class Elsewhere(Host):
    """Bytes outside of torch. Keeps what was taken and given, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[int, int]] = []  # (where it lay, bytes)
        self.given: list[Any] = []
        self.bytes = 0

    def take(self, tensor: Tensor) -> Any:
        self.taken.append((tensor.untyped_storage().data_ptr(), tensor.nbytes))
        assert tensor.is_floating_point()
        return np.array(tensor.detach().numpy())

    def give(self, kept: Any, device: torch.device) -> Tensor:
        self.given.append(kept)
        return torch.empty(kept.shape).copy_(torch.from_numpy(kept)) if isinstance(kept, np.ndarray) else kept


def gradients(trunk: Trunk, batch: Batch) -> dict[str, Tensor]:
    torch.manual_seed(7)
    trunk.model.zero_grad()
    logprobs_N = trunk.logprobs(batch, batch.weights_N)
    logprobs_N.dot(batch.weights_N).backward()
    found = {name: p.grad.clone() for name, p in trunk.model.named_parameters() if p.grad is not None}
    return {"logprobs": logprobs_N.detach(), **found}


@pytest.mark.parametrize("said", [False, True, "mlp"])
@pytest.mark.parametrize(
    ("name", "stored"), [("lora", "dense"), ("lora", "nf4"), ("full", "dense"), ("dora", "dense"), ("prefix", "nf4")]
)
def test_the_same_bits(name: str, stored: str, said: Any) -> None:
    model = tiny("llama", num_hidden_layers=3)
    if stored == "nf4":
        quantise(model, "nf4")
    METHODS[name].attach(model)
    trunk, batch = open_trunk(model), probe_batch(VOCABULARY)
    model.train()
    if said:
        Recomputed(model, said)
    room = GradientRoom(model) if name == "full" else None
    expected = gradients(trunk, batch)
    elsewhere = Elsewhere()
    offloaded = OffloadedActivations(model, elsewhere, small=1024)
    for _ in range(2):
        with offloaded.open():
            found = gradients(trunk, batch)
        assert found.keys() == expected.keys()
        for key, right in expected.items():
            assert torch.equal(found[key], right), key
    here = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert elsewhere.taken
    assert not here & {place for place, _ in elsewhere.taken}
    assert min(size for _, size in elsewhere.taken) >= 1024
    if room is not None:
        room.undo()
    trunk.close()


def test_memory_here_falls_to_what_is_in_flight() -> None:
    model = tiny("llama", num_hidden_layers=8, intermediate_size=192)
    LoRA(r=2).attach(model)
    trunk, batch = open_trunk(model), probe_batch(VOCABULARY, (-1,) * 6, (80,) * 6)
    model.train()
    peaks = []
    for offloaded in (None, OffloadedActivations(model, Elsewhere(), small=4096)):
        with Allocated() as seen:
            if offloaded is None:
                gradients(trunk, batch)
            else:
                with offloaded.open():
                    gradients(trunk, batch)
        peaks.append(seen.peak)
    assert peaks[1] < 0.35 * peaks[0]


def test_what_was_saved_before_is_fetched_ahead_and_saved_once() -> None:
    """What several products read is kept once and comes back once."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(64, 64)) for _ in range(4)]
    holder = nn.ParameterList(weights)
    elsewhere = Elsewhere()
    offloaded = OffloadedActivations(holder, elsewhere, small=1, ahead=1)
    x = torch.randn(8, 64)
    with offloaded.open():
        y = x
        for weight in weights[:3]:
            y = (y @ weight).tanh()
        ((y @ weights[3]) * (y @ weights[3].t())).sum().backward()
        assert len(elsewhere.given) == len(elsewhere.taken)  # each came back once
    found = [weight.grad.clone() for weight in weights if weight.grad is not None]
    for weight in weights:
        weight.grad = None
    y = x
    for weight in weights[:3]:
        y = (y @ weight).tanh()
    ((y @ weights[3]) * (y @ weights[3].t())).sum().backward()
    assert all(torch.equal(one, weight.grad) for one, weight in zip(found, weights, strict=True))
    sizes = [size for _, size in elsewhere.taken]
    assert len(sizes) == 1 + 3 + 2  # x, each tanh (read by its own backward and the product after it), two products


def test_what_is_changed_after_it_was_saved_is_not_mistaken() -> None:
    """The same memory with other numbers is kept a second time."""
    weight = nn.Parameter(torch.randn(16, 16))
    x = torch.randn(4, 16)
    offloaded = OffloadedActivations(nn.ParameterList([weight]), Elsewhere(), small=1)
    with offloaded.open():
        one = x @ weight
        x.mul_(2)
        two = x @ weight
        (one.sum() + two.sum()).backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, (1.5 * x).sum(0)[:, None].expand(16, 16))


# ------------------------------------------------------------------ the optimizer's state


def test_states_step_to_the_same_bits_and_rest_elsewhere() -> None:
    torch.manual_seed(0)
    start = [torch.randn(32, 16), torch.randn(16), torch.randn(8, 8)]
    steps = [[torch.randn_like(one) for one in start] for _ in range(4)]
    ends, peaks = [], []
    for away in (False, True):
        parameters = [nn.Parameter(one.clone()) for one in start]
        groups = [{"params": parameters[:2], "lr": 1e-2, "names": ["a", "b"]},
                  {"params": parameters[2:], "lr": 3e-2, "weight_decay": 0.1, "names": ["c"]}]  # fmt: skip
        optimizer = AdamW(groups, lr=1e-2, fused=True)
        elsewhere = Elsewhere()
        stepped: Any = OffloadedStates(optimizer, elsewhere) if away else optimizer
        for number, grads in enumerate(steps):
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = None if number == 1 and parameter is parameters[1] else grad
            for group in stepped.param_groups:
                group["lr"] *= 0.5
            stepped.step()
        ends.append([parameter.detach() for parameter in parameters])
        slots = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
        peaks.append(all(isinstance(value, np.ndarray) for value in slots))
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))
    assert peaks == [False, True]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_and_its_resume_are_those_without_it(method: str, tmp_path: Path) -> None:
    options = {"method": method, "steps": 4, "save_every": 2, "evaluation": 0, "max_grad_norm": 1.0}
    rig.run_through(tmp_path / "plain", **options)
    for stop in (True, False):
        run = rig.build(tmp_path / "away", resume=None if stop else "auto", **options)
        run.engine = run.engine.model_copy(update={"offload_activations": True, "offload_optimizer": True})
        for event in rig.train(run):
            if stop and event.event == "step" and event.step == 3:
                break
    assert rig.final_digests(tmp_path / "away", 4) == rig.final_digests(tmp_path / "plain", 4)


# ------------------------------------------------------------------ where it cannot be


@pytest.mark.parametrize("name", ["offload_activations", "offload_optimizer"])
def test_on_a_cpu_it_is_refused_in_one_line_before_anything_is_loaded(name: str) -> None:
    recipe = luthier.Recipe(model="/nowhere", data="rows.jsonl")
    asked = recipe.model_copy(update={"engine": EngineSection(device="cpu", **{name: True})})
    with pytest.raises(RecipeError, match="host's memory is the device's here") as caught:
        assemble(asked)
    assert caught.value.where == f"engine.{name}"
    assert "\n" not in caught.value.line()


def test_a_gpu_may_but_not_with_an_update_inside_backward() -> None:
    device, both = torch.device("cuda"), EngineSection(offload_activations=True, offload_optimizer=True)
    check_offload(device, both, in_backward=False)
    check_offload(device, EngineSection(offload_activations=True), in_backward=True)
    with pytest.raises(RecipeError, match="optimizer_in_backward"):
        check_offload(device, both, in_backward=True)
