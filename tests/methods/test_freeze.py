"""Freeze: what trains is what a filter on requires_grad says, nothing below it is kept, schedules resume exactly."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import trains
from luthier.engine.optimizer import load_state, state_tensors
from luthier.engine.precision import Precision, settle
from luthier.engine.state import load_trained, trained_tensors
from luthier.methods.freeze import Freeze, layers_open
from luthier.methods.full import Full
from luthier.models.parts import parts_of
from methods.rig import base, logits, loss, optimizer, train


def made(method: Freeze, family: str = "stories") -> nn.Module:
    model = base(family)
    method.attach(model)
    return model


def names(model: nn.Module, *, ever: bool = False) -> set[str]:
    return {name for name, p in model.named_parameters() if (trains(p) if ever else p.requires_grad)}


def layers(found: set[str]) -> set[int]:
    return {int(name.split(".")[2]) for name in found if ".layers." in name}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "stories"])
def test_every_parameter_is_in_one_part(family: str) -> None:
    model = base(family)
    parts = parts_of(model)
    listed = [*parts.embedding, *parts.after, *parts.head, *parts.rest, *(n for layer in parts.layers for n in layer)]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    assert len(parts.after) in (1, 2)  # the final norm
    assert bool(parts.head) == (family not in ("gpt2", "stories"))  # tied: it is the embedding
    assert not parts.rest


def test_a_bare_one_trains_the_last_two_layers() -> None:
    found = names(made(Freeze()))
    assert layers(found) == {3, 4}
    assert found - {name for name in found if ".layers." in name} == {"model.norm.weight"}
    head = names(made(Freeze(), "llama"))
    assert "lm_head.weight" in head
    assert "model.embed_tokens.weight" not in head


def test_steps_are_those_of_a_filter_on_requires_grad() -> None:
    """The oracle: torch's AdamW on a model whose other parameters were frozen by hand."""
    method = Freeze(train_last_n_layers=1)
    ours, theirs = made(method, "llama"), base("llama")
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name.startswith(("model.layers.1.", "model.norm", "lm_head")))
    train(method, ours, 4)
    optim = optimizer(Full(), theirs)
    for group in optim.param_groups:
        group["lr"] = 10 * method.default_learning_rate
    for _ in range(4):
        loss(theirs).backward()
        optim.step()
        optim.zero_grad()
    assert torch.equal(logits(ours), logits(theirs))


def test_nothing_is_kept_below_the_lowest_layer_that_trains() -> None:
    """Activations saved for the backward: fewer with every layer that rests at the bottom."""

    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            total = loss(model)
        total.backward()
        return sum(sizes.values())

    counts = [kept(made(Freeze(train_last_n_layers=n))) for n in (0, 1, 2, 3, 5)]
    steps = [b - a for a, b in itertools.pairwise(counts)]
    assert all(step > 0 for step in steps)
    assert kept(made(Freeze(train_last_n_layers=None, freeze_embeddings=False))) >= counts[-1]
    model = made(Freeze())
    loss(model).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names(model)


def test_patterns_freeze_and_unfreeze() -> None:
    found = names(made(Freeze(freeze=(".*mlp.*",), unfreeze=("model.layers.0.self_attn.q_proj",))))
    assert "model.layers.0.self_attn.q_proj.weight" in found
    assert not [name for name in found if "mlp" in name]
    assert layers(found) == {0, 3, 4}
    everything = names(made(Freeze(train_last_n_layers=None, freeze_embeddings=False)))
    assert everything == names_of_all("stories")
    one = Freeze(train_last_n_layers=0, unfreeze=("model.layers.1.",), freeze=("model.norm",))
    assert layers(names(made(one))) == {1}  # a dot is a dot: layer 10 would not be meant
    both = Freeze(freeze=("model.layers.4",), unfreeze=("model.layers.4.mlp",))
    assert "model.layers.4.mlp.up_proj.weight" in names(made(both))


def names_of_all(family: str) -> set[str]:
    return {name for name, _ in base(family).named_parameters()}


@pytest.mark.parametrize("every", [3, 0.3])
def test_layers_begin_from_the_top_down(every: float) -> None:
    method = Freeze(train_last_n_layers=3, unfreeze_every=every, freeze_embeddings=False)
    model = made(method)
    assert names(model, ever=True) > names(model)
    seen = []
    for step in range(1, 14):
        method.before_step(model, step, 10)
        found = names(model)
        seen.append((sorted(layers(found)), "model.embed_tokens.weight" in found))
        assert "model.norm.weight" in found
    assert seen[0] == seen[2] == ([4], False)
    assert seen[3] == ([3, 4], False)
    assert seen[6] == ([2, 3, 4], False)
    assert seen[9] == ([2, 3, 4], True)
    assert names(model) == names(model, ever=True)


def test_a_share_is_of_the_runs_steps() -> None:
    assert [layers_open(step, 200, 0.1) for step in (1, 20, 21, 200)] == [1, 1, 2, 10]
    assert [layers_open(step, 3, 0.01) for step in (1, 2, 3)] == [1, 2, 3]


def test_a_schedule_resumes_to_the_bit_from_a_checkpoint() -> None:
    """Weights as the engine keeps them, what rests at the moment included; moments too."""
    method = Freeze(train_last_n_layers=3, unfreeze_every=2)
    model, twin = made(method), made(method)
    first = optimizer(method, model)
    train(method, model, 3, optim=first)
    load_trained(twin, {name: t.clone() for name, t in trained_tensors(model).items()})
    second = optimizer(method, twin)
    load_state(second, *copy.deepcopy(state_tensors(first)))
    for one, optim in ((model, first), (twin, second)):
        train(method, one, 4, first=3, optim=optim)
    assert torch.equal(logits(model), logits(twin))
    assert len(trained_tensors(model)) == len(names(model, ever=True))


def test_what_will_train_is_kept_in_float32() -> None:
    model = made(Freeze(train_last_n_layers=2, unfreeze_every=5)).to(torch.bfloat16)
    settle(model, Precision("bf16", torch.bfloat16, torch.bfloat16))
    assert {p.dtype for p in model.parameters() if trains(p)} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not trains(p)} == {torch.bfloat16}


def test_what_makes_no_sense_is_refused() -> None:
    for bad in (
        {"train_last_n_layers": -1}, {"unfreeze_every": 0.0}, {"unfreeze_every": 1.5}, {"freeze": ("(",)},
        {"unfreeze": ("model.embed_tokens.weight[:100]",)},
    ):  # fmt: skip
        with pytest.raises(RecipeError) as caught:
            Freeze(**bad)
        assert caught.value.where == f"method.{next(iter(bad))}"
        assert caught.value.remedy
    with pytest.raises(RecipeError, match="5 layers"):
        made(Freeze(train_last_n_layers=6))
    with pytest.raises(RecipeError, match="nothing is left"):
        made(Freeze(freeze=(".*",)))
    with pytest.raises(RecipeError, match="no parameter of this model matches"):
        Freeze(freeze=("transformer.h.0",)).check(base("llama"))
    Freeze(freeze=("model.layers.0",)).check(base("llama"))
