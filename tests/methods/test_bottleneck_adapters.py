"""Houlsby, Pfeiffer and parallel adapters: the `adapters` library's numbers, places, options, refusals, a training."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import ModelError, NotMergeable, RecipeError
from luthier.methods.houlsby import Houlsby
from luthier.methods.parallel_adapter import ParallelAdapter
from luthier.methods.pfeiffer import Pfeiffer
from luthier.models.adapter_hub import from_hub, to_hub
from luthier.models.peft_names import live
from luthier.models.probe import open_trunk
from luthier.models.sites import AdaptedModule, named_sites, sites, trained_in_place
from methods import golden_adapters as golden
from methods.rig import base, logits, optimizer, shared_as_batches, stir, train


@dataclass(frozen=True)
class Case:
    file: str
    method: Houlsby
    families: tuple[str, ...] = ("llama", "gpt2")
    reads: str = "block"
    options: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("houlsby", Houlsby(reduction_factor=4)),
    Case("pfeiffer", Pfeiffer(reduction_factor=4)),
    Case("pfeiffer_stream", Pfeiffer(reduction_factor=4, reads="stream"), reads="stream"),
    Case("parallel_adapter", ParallelAdapter(reduction_factor=4)),
    Case("parallel_learned", ParallelAdapter(reduction_factor=4, scaling="learned"), ("llama",)),
]
ALL = (Houlsby, Pfeiffer, ParallelAdapter)


@pytest.mark.parametrize(("one", "family"), [pytest.param(c, f, id=f"{c.file}-{f}") for c in CASES for f in c.families])
def test_logits_and_gradients_are_the_librarys(one: Case, family: str) -> None:
    asked, tensors, slopes = golden.case(one.file, family)
    model = golden.base(family)
    one.method.attach(model)
    names = from_hub(tensors, family, reads=one.reads)
    one.method.load(model, {names[theirs]: tensor for theirs, tensor in tensors.items()})
    torch.testing.assert_close(golden.run(model, asked), asked["logits"], atol=1e-5, rtol=1e-4)
    found = live(model)
    for theirs, slope in slopes.items():
        torch.testing.assert_close(found[names[theirs]].grad, slope, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("one", CASES, ids=lambda c: c.file)
def test_names_of_the_library_and_back(one: Case) -> None:
    for family in one.families:
        model = golden.base(family)
        one.method.attach(model)
        _, tensors, _ = golden.case(one.file, family)
        there = to_hub(one.method.tensors(model), family, golden.NAME)
        assert set(there.values()) == set(tensors)
        assert {ours: theirs for theirs, ours in from_hub(tensors, family, reads=one.reads).items()} == there


def test_names_of_anything_else_are_refused() -> None:
    with pytest.raises(ModelError, match="no bottleneck adapter"):
        to_hub(["base_model.model.model.layers.0.mlp.lora_A.weight"], "llama", "a")
    with pytest.raises(ModelError, match="no bottleneck adapter"):
        from_hub(["model.layers.0.self_attn.q_proj.loras.a.lora_A"], "llama")
    with pytest.raises(ModelError, match="family"):
        to_hub([], "mamba", "a")


@pytest.mark.parametrize(
    ("method", "places"),
    [
        (Houlsby(), ["self_attn", "mlp"]),
        (Pfeiffer(), ["mlp"]),
        (ParallelAdapter(), ["mlp"]),
        (Pfeiffer(reads="stream"), [""]),
    ],
    ids=lambda v: v.kind if isinstance(v, Houlsby) else None,
)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_places_and_counts(method: Houlsby, places: list[str], family: str) -> None:
    model = base(family)
    method.attach(model)
    expected = [f"model.layers.{n}.{place}".removesuffix(".") for n in range(2) for place in places]
    assert sorted(path for path, _ in named_sites(model)) == sorted(expected)
    size = method.size(64)
    each = 2 * 64 * size + size + 64
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == each * len(expected)


def test_the_parallel_adapter_is_the_formula() -> None:
    """By hooks on an untouched model: what the block reads, s = 4, beside what it returns."""
    model, twin = base("llama"), base("llama")
    ParallelAdapter(bottleneck_size=5).attach(model)
    stir(model)
    tensors = {name: t.detach() for name, t in live(model).items()}

    def beside(path: str) -> Any:
        def hook(block: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            down, b, up, c = (
                tensors[f"base_model.model.{path}.adapter_{name}"]
                for name in ("down.weight", "down.bias", "up.weight", "up.bias")
            )
            return out + 4.0 * (torch.relu(args[0] @ down.T + b) @ up.T + c)

        return hook

    for index, layer in enumerate(twin.model.layers):
        layer.mlp.register_forward_hook(beside(f"model.layers.{index}.mlp"))
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("scaling", [2.0, "learned", "channel"])
def test_options_survive_files(kind: type[Houlsby], scaling: Any, tmp_path) -> None:
    method = kind(bottleneck_size=3, non_linearity="gelu_new", scaling=scaling, layers_to_transform=1, dropout=0.25,
                  train_norms=True, modules_to_save=("lm_head",), init_weights="bert")  # fmt: skip
    model = base("llama")
    method.attach(model)
    train(method, model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    fresh = base("llama")
    again = load_adapter(tmp_path / "a", fresh)
    assert again == method
    assert torch.equal(logits(fresh), logits(model))
    assert len(trained_in_place(fresh)) == 5
    untouched = logits(base("llama"))
    with again.off(fresh):
        assert torch.equal(logits(fresh), untouched)
    assert not torch.equal(logits(fresh), untouched)


@pytest.mark.parametrize("kind", ALL)
def test_the_start(kind: type[Houlsby]) -> None:
    """`mam_adapter` is the base; `houlsby` is near it, its weights within two deviations of 0.01."""
    model, untouched = base("llama"), logits(base("llama"))
    kind(init_weights="mam_adapter").attach(model)
    assert torch.equal(logits(model), untouched)
    model = base("llama")
    kind(init_weights="houlsby").attach(model)
    weights = torch.cat([t.detach().flatten() for n, t in live(model).items() if n.endswith("weight")])
    biases = torch.cat([t.detach().flatten() for n, t in live(model).items() if n.endswith("bias")])
    assert 0.008 < weights.std() < 0.0095
    assert weights.abs().max() <= 0.02
    assert not biases.any()
    near = 0.5 if kind is ParallelAdapter else 0.05  # it reads normed rows, which are larger here, four times
    assert 0 < (logits(model) - untouched).abs().max() < near


def test_dropout_is_in_training_only() -> None:
    model = base("llama")
    Houlsby(dropout=0.5, init_weights="bert").attach(model)
    stir(model)
    still = logits(model)
    assert torch.equal(logits(model), still)
    model.train()
    torch.manual_seed(0)
    first = logits(model)
    assert not torch.equal(first, still)
    torch.manual_seed(0)
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("kind", ALL)
def test_a_bare_recipe_learns(kind: type[Houlsby]) -> None:
    """100 steps at the method's own rate on one half of some random rows lower the loss of the other half."""
    model = base("stories")
    torch.manual_seed(0)
    method = kind()
    method.attach(model)
    rows = torch.randint(5, 60, (16, 12), generator=torch.Generator().manual_seed(2))

    def loss(part: torch.Tensor) -> torch.Tensor:
        scores = model(input_ids=part).logits[:, 5:-1]
        return nn.functional.cross_entropy(scores.flatten(0, 1), part[:, 6:].flatten())

    with torch.no_grad():
        before = loss(rows[8:])
    optim = optimizer(method, model)
    for group in optim.param_groups:
        group["lr"] = method.default_learning_rate
    for _ in range(100):
        loss(rows[:8]).backward()
        optim.step()
        optim.zero_grad()
    with torch.no_grad():
        assert loss(rows[8:]) < before - 0.2


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"bottleneck_size": 0}, "method.bottleneck_size"),
        ({"reduction_factor": 0.0}, "method.reduction_factor"),
        ({"non_linearity": "softmax"}, "method.non_linearity"),
        ({"init_weights": "zero"}, "method.init_weights"),
        ({"scaling": "free"}, "method.scaling"),
        ({"dropout": 1.0}, "method.dropout"),
        ({"adapter_dtype": "fp64"}, "method.adapter_dtype"),
    ],
    ids=lambda v: v.partition(".")[2] if isinstance(v, str) else "",
)
def test_bad_values_are_refused(kind: type[Houlsby], options: dict[str, Any], names: str) -> None:
    with pytest.raises(RecipeError) as caught:
        kind(**options)
    assert caught.value.where == names
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"layers_to_transform": 2}, "method.layers_to_transform"),
        ({"layers_to_transform": ()}, "method.layers_to_transform"),
        ({"modules_to_save": ("mlp",)}, "method.modules_to_save"),
        ({"modules_to_save": ("layers.0",)}, "method.modules_to_save"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(options: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Houlsby(**options).attach(base("llama"))
    assert caught.value.where == where
    with pytest.raises(RecipeError, match="shares its weight"):
        Houlsby(modules_to_save=("lm_head",)).attach(base("gpt2"))


@pytest.mark.parametrize("kind", ALL)
def test_a_layer_of_loose_linears_is_refused(kind: type[Houlsby]) -> None:
    """OPT's feed-forward is two linears of the layer itself; an adapter of the layer's result still fits."""
    sizes = dict(vocab_size=300, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", word_embed_proj_dim=32, **sizes)).eval()
    with pytest.raises(RecipeError, match="no single one") as caught:
        kind().attach(model)
    assert caught.value.remedy
    assert not sites(model)
    before = logits(model)
    Pfeiffer(reads="stream", init_weights="mam_adapter").attach(model)
    assert torch.equal(logits(model), before)
    stir(model)
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ALL)
def test_the_score_head_of_a_reward_model_trains_and_is_saved(kind: type[Houlsby], tmp_path) -> None:
    sizes = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model("llama", num_key_value_heads=2, num_labels=1, pad_token_id=0, **sizes)

    def scorer() -> nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).eval()

    method, model = kind(), scorer()
    method.attach(model)
    assert model.score.copy.weight.requires_grad
    stir(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    fresh = scorer()
    load_adapter(tmp_path / "a", fresh)
    assert torch.equal(logits(fresh), logits(model))
    with method.off(model):
        assert torch.equal(logits(model), logits(scorer()))


def test_files_of_another_kind_are_refused(tmp_path) -> None:
    method, model = Houlsby(), base("llama")
    method.attach(model)
    with pytest.raises(NotMergeable, match="non-linearity"):
        method.merge(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    side = tmp_path / "a/luthier.json"
    side.write_text(json.dumps({**json.loads(side.read_text()), "method": "pfeiffer"}))
    with pytest.raises(ModelError, match="not of method pfeiffer"):
        load_adapter(tmp_path / "a", base("llama"))


@pytest.mark.parametrize("method", [Houlsby(), ParallelAdapter(), Pfeiffer(), Pfeiffer(reads="stream")], ids=str)
def test_packed_rows_recomputed_and_restricted_are_each_row_alone(method: Houlsby) -> None:
    """With the last layer restricted to scored rows, and with activations recomputed: values and gradients."""
    model = base("llama")
    method.attach(model)
    stir(model)
    trunk = open_trunk(model)
    assert trunk.facts.last_layer == "scored rows"
    shared, alone = shared_as_batches()
    grown = [p for p in model.parameters() if p.requires_grad]

    def run(batches: list[Any]) -> tuple[torch.Tensor, ...]:
        found = torch.cat([trunk.logprobs(batch) for batch in batches])
        return found.detach(), *torch.autograd.grad(found.dot(torch.linspace(0.5, 1.5, len(found))), grown)

    plain = run(alone)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for mine, other in zip(run([shared]), plain, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


def test_every_adapter_is_a_site_after_a_module() -> None:
    model = base("qwen3_moe")
    Houlsby().attach(model)
    assert {type(site) for _, site in named_sites(model)} == {AdaptedModule}
