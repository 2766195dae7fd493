"""MAM and UniPELT: the `adapters` library's numbers, their parts alone, causality, options, files, a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.batch import Forest
from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.methods.mam import Mam
from luthier.methods.parallel_adapter import ParallelAdapter
from luthier.methods.prefix import PrefixTuning
from luthier.methods.unipelt import UniPELT
from luthier.models.attention import DENSE, forest_context
from luthier.models.decoder_site import DecoderSite
from luthier.models.gated_prefix import GatedAttention
from luthier.models.peft_names import PREFIX, live
from luthier.models.probe import open_trunk
from luthier.models.sites import AdaptedLinear, AdaptedModule, Site, named_sites, sites
from luthier.models.switch import attention_as
from luthier.sampling.generate import SamplingSpec, generate
from methods import golden_adapters as golden
from methods.rig import TOKENS, base, logits, optimizer, rows_as_batches, shared_as_batches, stir, train

_LEAVES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "gate.weight": "lora_gate.weight",
           "gate.bias": "lora_gate.bias"}  # fmt: skip
_ADAPTER = {"adapter_down.0": "adapter_down", "adapter_up": "adapter_up", "gate": "adapter_gate"}
SMALL: dict[str, Any] = {"num_virtual_tokens": 4, "prefix_projection": False, "bottleneck_size": 6}


def ours(name: str) -> str:
    """The library's name of a tensor that is not the prefix -> ours."""
    if ".output_adapters." in name:
        layer, rest = name.split(".output_adapters.adapters.tuned.")
        part, leaf = rest.rsplit(".", 1)
        return f"{PREFIX}{layer}.mlp.{_ADAPTER[part]}.{leaf}"
    if ".loras." in name:
        linear, leaf = name.split(".loras.tuned.")
        return f"{PREFIX}{linear}.{_LEAVES[leaf]}"
    block, leaf = name.split(".prefix_tuning.prefix_gates.tuned.")
    return f"{PREFIX}{block}.prefix_gate.{leaf}"


def compare(method: Mam, case: str, family: str, skipped: tuple[str, ...] = ()) -> None:
    """Weights of a golden file copied in; logits and gradients as the library has them."""
    asked, tensors, slopes = golden.case(case, family)
    model = golden.base(family)
    method.attach(model)
    (key,) = [name for name in tensors if name.endswith("control_trans")]
    flat = {"prompt_embeddings": tensors[key].view(method.num_virtual_tokens, -1)}
    method.load(model, flat | {ours(name): t for name, t in tensors.items() if name != key})
    torch.testing.assert_close(golden.run(model, asked), asked["logits"], atol=1e-5, rtol=1e-4)
    found = live(model)
    virtual = next(site.delta for site in sites(model) if isinstance(site, DecoderSite))
    torch.testing.assert_close(virtual.rows.grad.flatten(), slopes[key], atol=1e-5, rtol=1e-4)
    compared = [name for name in slopes if name != key and not name.endswith(skipped)]
    assert compared
    for name in compared:
        torch.testing.assert_close(found[ours(name)].grad, slopes[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mam_is_the_librarys(family: str) -> None:
    compare(Mam(num_virtual_tokens=3, prefix_projection=False, bottleneck_size=4), "mam", family)


def test_unipelt_is_the_librarys_where_all_tokens_have_one_gate() -> None:
    """Gates of zero weights: the mean over tokens is the gate of each (the gradient of the weights differs)."""
    method = UniPELT(num_virtual_tokens=3, prefix_projection=False, bottleneck_size=4, r=2,
                     target_modules=("q_proj", "v_proj"))  # fmt: skip
    compare(method, "unipelt", "llama", ("gate.weight", "tuned.weight"))


def test_unipelt_is_the_librarys_on_rows_of_one_token() -> None:
    """There a mean over tokens is the token's own gate: weights, biases and gates of any value."""
    method = UniPELT(num_virtual_tokens=3, prefix_projection=False, bottleneck_size=4, r=2,
                     target_modules=("q_proj", "v_proj"))  # fmt: skip
    compare(method, "unipelt_single", "llama")


def attached(method: Mam, family: str = "llama") -> nn.Module:
    model = base(family)
    torch.manual_seed(0)
    method.attach(model)
    stir(model)
    return model


def only(model: nn.Module, *kinds: type[Site]) -> None:
    for site in sites(model):
        site.on = isinstance(site, kinds)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_mam_is_each_part_when_the_other_adds_nothing(family: str) -> None:
    method = Mam(**SMALL)
    model = attached(method, family)
    tensors = method.tensors(model)
    adapters = {name: t for name, t in tensors.items() if name != "prompt_embeddings"}
    prefix, parallel = PrefixTuning(num_virtual_tokens=4), ParallelAdapter(bottleneck_size=6)
    alone = [base(family), base(family)]
    for part, twin in zip((prefix, parallel), alone, strict=True):
        part.attach(twin)
    prefix.load(alone[0], {"prompt_embeddings": tensors["prompt_embeddings"]})
    parallel.load(alone[1], adapters)
    both = logits(model)
    only(model, AdaptedModule)
    torch.testing.assert_close(logits(model), logits(alone[1]), atol=1e-6, rtol=1e-5)
    only(model, DecoderSite)
    torch.testing.assert_close(logits(model), logits(alone[0]), atol=1e-6, rtol=1e-5)
    only(model, Site)
    method.load(model, {n: torch.zeros_like(t) if "adapter_up" in n else t for n, t in tensors.items()})
    torch.testing.assert_close(logits(model), logits(alone[0]), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(both, logits(model), atol=1e-3)


@pytest.mark.parametrize("method", [Mam(**SMALL), UniPELT(**SMALL)], ids=["mam", "unipelt"])
@pytest.mark.parametrize("attention", ["native", "forest"])
def test_a_later_token_changes_nothing_before_it(method: Mam, attention: str) -> None:
    model = attached(method)
    if attention == "native":
        other = TOKENS.clone()
        other[:, 5:] = (other[:, 5:] + 7) % 200
        assert torch.equal(logits(model)[:, :5], logits(model, other)[:, :5])
        assert not torch.equal(logits(model)[:, 5:], logits(model, other)[:, 5:])
        return
    trunk = open_trunk(model, attention=attention)
    batch, _ = rows_as_batches()
    moved = batch.tokens_T.clone()
    moved[-1] = (moved[-1] + 1) % 200  # the last row's last token: it is predicted, and nothing reads it
    with torch.no_grad():
        before, after = trunk.logits(batch), trunk.logits(type(batch)(**{**vars(batch), "tokens_T": moved}))
    assert torch.equal(before, after)


@pytest.mark.parametrize("method", [Mam(**SMALL), UniPELT(**SMALL)], ids=["mam", "unipelt"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_a_cache_is_generation_without(method: Mam, family: str) -> None:
    model = attached(method, family)
    with_cache, without = (
        model.generate(TOKENS[:1], max_new_tokens=6, do_sample=False, use_cache=use, eos_token_id=None)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1, :8].tolist()]
    spec = SamplingSpec(max_new_tokens=5)
    together = generate(model, None, prompts, spec)
    assert together == [generate(model, None, [prompt], spec)[0] for prompt in prompts]


@pytest.mark.parametrize("method", [Mam(**SMALL), UniPELT(**SMALL)], ids=["mam", "unipelt"])
def test_packed_rows_recomputed_and_restricted_are_each_row_alone(method: Mam) -> None:
    """With the last layer restricted to scored rows, and with activations recomputed: values and gradients."""
    model = attached(method)
    trunk = open_trunk(model)
    assert trunk.facts.last_layer == "scored rows"
    shared, alone = shared_as_batches()
    grown = [p for p in model.parameters() if p.requires_grad]

    def run(batches: list[Any]) -> tuple[Tensor, ...]:
        found = torch.cat([trunk.logprobs(batch) for batch in batches])
        return found.detach(), *torch.autograd.grad(found.dot(torch.linspace(0.5, 1.5, len(found))), grown)

    plain = run(alone)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for mine, other in zip(run([shared]), plain, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


def test_the_sites_of_unipelt() -> None:
    model = attached(UniPELT(**SMALL))
    found = [(path, type(site)) for path, site in named_sites(model)]
    per_layer = [
        (f"model.layers.{n}.{path}", kind)
        for n in range(2)
        for path, kind in [
            ("self_attn", GatedAttention),
            *[(f"self_attn.{x}_proj", AdaptedLinear) for x in "qkvo"],
            ("mlp", AdaptedModule),
        ]
    ]
    assert sorted(found[1:], key=str) == sorted(per_layer, key=str)
    assert issubclass(found[0][1], DecoderSite)


@pytest.mark.parametrize("attention", ["eager", DENSE])
def test_unipelt_on_another_attention_is_the_same(attention: str) -> None:
    """Eager, and forest attention spelled out as one dense mask."""
    model = attached(UniPELT(**SMALL))
    expected, tokens = logits(model)[:1], TOKENS.shape[1]
    forest = Forest((0,), (tokens,), (-1,))
    with attention_as(model, attention), forest_context(forest), torch.no_grad():
        found = model(input_ids=TOKENS[:1], position_ids=torch.arange(tokens)[None], use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_shut_gates_leave_the_base_but_for_the_prefixs_share() -> None:
    """Gates near 0: no pair, no adapter adds anything; P keys of score 0 and value 0 still take their share."""
    method = UniPELT(**SMALL)
    model = attached(method)
    with torch.no_grad():
        for name, tensor in live(model).items():
            if "gate.bias" in name:
                tensor.fill_(-60.0)
            elif "gate.weight" in name:
                tensor.zero_()
    zero = base("llama")
    prefix = PrefixTuning(num_virtual_tokens=4, init_weights="zero")
    prefix.attach(zero)
    torch.testing.assert_close(logits(model), logits(zero), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        Mam(**SMALL, non_linearity="gelu", scaling="learned", dropout=0.25, modules_to_save=("lm_head",)),
        UniPELT(**SMALL, r=3, target_modules=("down_proj", "q_proj"), lora_dropout=0.1, scaling=2.0),
        UniPELT(**SMALL, target_modules="all-linear", modules_to_save=("norm",)),
        UniPELT(**SMALL, target_modules=r".*\.(q|v)_proj"),
    ],
    ids=["mam", "unipelt", "all-linear", "regex"],
)
def test_options_survive_files(method: Mam, tmp_path) -> None:
    model = base("llama")
    method.attach(model)
    train(method, model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    fresh = base("llama")
    again = load_adapter(tmp_path / "a", fresh)
    assert torch.equal(logits(fresh), logits(model))
    assert again.config(fresh) == method.config(model)
    if not isinstance(getattr(method, "target_modules", ()), str):
        assert again == method
    with pytest.raises(NotMergeable, match="no token has"):
        again.merge(fresh)


@pytest.mark.parametrize("method", [Mam(**SMALL), UniPELT(**SMALL)], ids=["mam", "unipelt"])
def test_the_score_head_of_a_reward_model_trains_and_is_saved(method: Mam, tmp_path) -> None:
    sizes = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model("llama", num_key_value_heads=2, num_labels=1, pad_token_id=0, **sizes)

    def scorer() -> nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).eval()

    model = scorer()
    method.attach(model)
    assert model.score.copy.weight.requires_grad
    stir(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    fresh = scorer()
    load_adapter(tmp_path / "a", fresh)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("kind", [Mam, UniPELT])
def test_a_bare_recipe_learns(kind: type[Mam]) -> None:
    """100 steps at the method's own rate on one half of some random rows lower the loss of the other half."""
    model = base("stories")
    torch.manual_seed(0)
    method = kind()
    method.attach(model)
    rows = torch.randint(5, 60, (16, 12), generator=torch.Generator().manual_seed(2))

    def loss(part: Tensor) -> Tensor:
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


@pytest.mark.parametrize(
    ("kind", "options", "where"),
    [
        (Mam, {"num_virtual_tokens": 0}, "method.num_virtual_tokens"),
        (Mam, {"bottleneck_size": 0}, "method.bottleneck_size"),
        (Mam, {"scaling": "free"}, "method.scaling"),
        (UniPELT, {"r": 0}, "method.r"),
        (UniPELT, {"lora_dropout": 1.0}, "method.lora_dropout"),
        (UniPELT, {"dropout": 1.0}, "method.dropout"),
    ],
)
def test_bad_values_are_refused(kind: type[Mam], options: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        kind(**options)
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("method", "family", "where"),
    [
        (Mam(**SMALL, modules_to_save=("mlp",)), "llama", "method.modules_to_save"),
        (Mam(**SMALL, modules_to_save=("lm_head",)), "gpt2", "method.modules_to_save"),
        (Mam(**{**SMALL, "num_virtual_tokens": 512}), "gpt2", "method.num_virtual_tokens"),
        (UniPELT(**SMALL, target_modules=("nowhere",)), "llama", "method.target_modules"),
        (UniPELT(**SMALL, target_modules=("embed_tokens",)), "llama", "method.target_modules"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_leaves_it_alone(method: Mam, family: str, where: str) -> None:
    model = base(family)
    with pytest.raises(RecipeError) as caught:
        method.attach(model)
    assert caught.value.where == where
    assert not sites(model)
