"""Prefix tuning and P-tuning v2 against PEFT: logits, gradients, files, generation; and the prefix on every path."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaConfig

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.engine.state import load_trained, trained_tensors
from luthier.methods.p_tuning_v2 import PTuningV2
from luthier.methods.prefix import PrefixTuning
from luthier.models.attention import DENSE, forest_context
from luthier.models.prefix_site import PrefixShape, prefix_shape
from luthier.models.probe import open_trunk
from luthier.models.recompute import Recomputed
from luthier.models.switch import attention_as, native_attention
from luthier.sampling.generate import SamplingSpec, generate
from methods.rig import TOKENS, base, logits, loss, rows_as_batches, shared_as_batches, train
from tiny import tiny
from tiny_families import family as other_family

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ("llama", "gpt2", "qwen2", "qwen3_moe")
LENGTH = 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zero": {"init_weights": "zero"},
    "network": {"prefix_projection": True},
    "narrow network": {"prefix_projection": True, "encoder_hidden_size": 12},
}


def attached(family: str, **options: Any) -> tuple[PrefixTuning, nn.Module]:
    torch.manual_seed(4)
    model, method = base(family), PrefixTuning(num_virtual_tokens=LENGTH, **options)
    method.attach(model)
    return method, model


def oracle_of(family: str, model: nn.Module, **options: Any) -> Any:
    """PEFT's model with the same numbers in its encoder."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, **options)
    oracle = peft.get_peft_model(base(family), config).eval()
    for (_, theirs), mine in zip(oracle.prompt_encoder.named_parameters(), ours(model), strict=True):
        theirs.data.copy_(mine)
    return oracle


def ours(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_pefts(family: str, options: dict[str, Any]) -> None:
    _, model = attached(family, **options)
    oracle = oracle_of(family, model, **options)
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
    loss(model).backward()
    loss(oracle).backward()
    for mine, theirs in zip(ours(model), oracle.prompt_encoder.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_a_padding_mask_and_given_positions_are_read_as_peft_reads_them() -> None:
    for family in ("llama", "gpt2"):
        _, model = attached(family)
        oracle = oracle_of(family, model)
        mask = torch.ones_like(TOKENS)
        mask[0, :3] = 0
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            mine, theirs = (m(input_ids=TOKENS, **given).logits[:, 3:] for m in (model, oracle))
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"prefix_projection": True}], ids=["plain", "network"])
def test_files_both_ways(options: dict[str, Any], tmp_path) -> None:
    for family in FAMILIES:
        method, model = attached(family, **options)
        save_adapter(tmp_path / family / "ours", method, model, base_path="tiny")
        theirs = peft.PeftModel.from_pretrained(base(family), tmp_path / family / "ours").eval()
        torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-4)
        oracle = oracle_of(family, model, **options)
        oracle.save_pretrained(tmp_path / family / "theirs")
        loaded, notes = base(family), []
        again = load_adapter(tmp_path / family / "theirs", loaded, notes=notes)
        assert isinstance(again, PrefixTuning)
        assert not [note for note in notes if "virtual" in note or "token_dim" in note]
        torch.testing.assert_close(logits(loaded), logits(oracle), atol=1e-5, rtol=1e-4)


def test_only_what_the_network_gives_is_saved_and_a_loaded_file_trains_on_without_it(tmp_path) -> None:
    method, model = attached("llama", prefix_projection=True)
    train(method, model)
    assert {n: tuple(t.shape) for n, t in method.tensors(model).items()} == {"prompt_embeddings": (LENGTH, 2 * 2 * 32)}
    save_adapter(tmp_path / "adapter", method, model, base_path="tiny")
    fresh = base("llama")
    again = load_adapter(tmp_path / "adapter", fresh)
    assert torch.equal(logits(fresh), logits(model))
    assert [tuple(p.shape) for p in ours(fresh)] == [(LENGTH, 128)]
    before = loss(fresh).item()
    train(again, fresh, 4)
    assert loss(fresh).item() < before


def test_a_checkpoint_keeps_the_network() -> None:
    method, model = attached("llama", prefix_projection=True)
    train(method, model)
    torch.manual_seed(9)
    twin = base("llama")
    method.attach(twin)
    load_trained(twin, trained_tensors(model))
    assert torch.equal(logits(twin), logits(model))
    assert len(ours(twin)) == 5


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_generation_is_pefts_and_a_batch_is_each_prompt_alone(family: str) -> None:
    _, model = attached(family)
    oracle = oracle_of(family, model)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [40], [50, 60, 70]]
    open_trunk(model)  # forest attention stays switched in, as while training
    made = generate(model, None, prompts, SamplingSpec(max_new_tokens=8, batch=3))
    assert [generate(model, None, [p], SamplingSpec(max_new_tokens=8))[0] for p in prompts] == made
    for prompt, new in zip(prompts, made, strict=True):
        row = torch.tensor([prompt])
        out = oracle.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=8, do_sample=False,
                              eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert out[0, len(prompt) :].tolist() == new
        for token in new:  # and without a cache
            with native_attention(model), torch.no_grad():
                assert model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].argmax() == token
            prompt = [*prompt, token]


def test_outputs_show_the_callers_cache_and_nothing_of_the_prefix() -> None:
    _, model = attached("llama")
    with torch.no_grad():
        first = model(input_ids=TOKENS[:, :5], use_cache=True)
        assert first.past_key_values.get_seq_length() == 5
        second = model(input_ids=TOKENS[:, 5:], past_key_values=first.past_key_values)
        assert second.past_key_values is first.past_key_values
        assert second.past_key_values.get_seq_length() == TOKENS.shape[1]
        torch.testing.assert_close(second.logits, logits(model)[:, 5:], atol=1e-5, rtol=1e-4)
        assert model(input_ids=TOKENS, use_cache=False).past_key_values is None
        assert len(model(input_ids=TOKENS, use_cache=False, return_dict=False)) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "stories"])
def test_forest_in_the_order_of_a_run_is_native_and_dense(family: str) -> None:
    """The trunk opened before the method attaches, the last layer on scored rows, trees and plain rows."""
    model = base(family)
    trunk = open_trunk(model)
    assert (trunk.facts.last_layer == "scored rows") == (family != "gpt2")
    torch.manual_seed(4)
    PrefixTuning(num_virtual_tokens=LENGTH).attach(model)
    twin = copy.deepcopy(model)
    native = open_trunk(twin, attention="unpacked")
    for batch in (rows_as_batches()[0], shared_as_batches()[0]):
        found, expected = trunk.logprobs(batch), native.logprobs(batch)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        mine, theirs = (torch.autograd.grad(x.sum(), ours(m)) for x, m in ((found, model), (expected, twin)))
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
        with torch.no_grad(), attention_as(model, DENSE):
            whole = _dense_logits(model, batch)
        torch.testing.assert_close(whole, trunk.logits(batch).detach(), atol=1e-4, rtol=1e-4)


def _dense_logits(model: Any, batch: Any) -> Tensor:
    with forest_context(batch.forest):
        rows = model(input_ids=batch.tokens_T[None], position_ids=batch.positions_T[None], use_cache=False).logits[0]
    return rows[batch.scored_N]


@pytest.mark.parametrize("attention", ["forest", "unpacked"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recompute_of_activations_changes_nothing(family: str, attention: str) -> None:
    _, model = attached(family)
    trunk = open_trunk(model, attention=attention)
    batch = shared_as_batches()[0]
    model.train()
    found = []
    for recompute in (False, True):
        if recompute:
            Recomputed(model)
        logprobs = trunk.logprobs(batch)
        found.append((logprobs.detach(), *torch.autograd.grad(logprobs.sum(), ours(model))))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)
    if attention == "unpacked":
        assert all(m.gradient_checkpointing for m in model.modules() if "gradient_checkpointing" in vars(m))


def test_the_kernel_of_one_call_has_no_place_for_a_prefix_and_is_passed_over() -> None:
    _, model = attached("llama")
    trunk, batch = open_trunk(model), shared_as_batches()[0]
    expected = trunk.logprobs(batch)
    trunk.facts = replace(trunk.facts, kernel="varlen")  # which this device has not
    torch.testing.assert_close(trunk.logprobs(batch), expected, atol=1e-6, rtol=1e-5)


def test_counts_of_real_shapes() -> None:
    llama_8b, llama_70b = PrefixShape(32, 8, 128), PrefixShape(80, 8, 128)
    for shape, count in ((llama_8b, 1_310_720), (llama_70b, 3_276_800)):
        encoder = PrefixTuning(num_virtual_tokens=20).encoder(shape, torch.device("cpu"))
        assert sum(p.numel() for p in encoder.parameters()) == count
    wide = PrefixTuning(num_virtual_tokens=20, prefix_projection=True, encoder_hidden_size=512)
    encoder = wide.encoder(prefix_shape(base("llama"), "prefix"), torch.device("cpu"))
    assert sum(p.numel() for p in encoder.parameters()) == 20 * 32 + (32 * 512 + 512) + (512 * 128 + 128)


@pytest.mark.parametrize("name", ["cohere", "granite", "stablelm", "roberta", "gptj"])
def test_other_families_see_it_alike_on_both_paths(name: str) -> None:
    model = other_family(name)
    trunk = open_trunk(model)
    assert trunk.path == ("unpacked" if name == "gptj" else "forest")
    torch.manual_seed(4)
    before, batch = trunk.logprobs(shared_as_batches()[0]), shared_as_batches()[0]
    PrefixTuning(num_virtual_tokens=LENGTH).attach(model)
    native = open_trunk(copy.deepcopy(model), attention="unpacked")
    torch.testing.assert_close(trunk.logprobs(batch), native.logprobs(batch), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(trunk.logprobs(batch), before)


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3", "gpt_oss", "llama4", "mistral", "deepseek_v3", "diffllama", "mamba", "lfm2",
             "qwen3_next", "falcon_h1"]
)  # fmt: skip
def test_layers_without_all_earlier_keys_refuse(name: str) -> None:
    model = other_family(name)
    with pytest.raises(RecipeError, match="cannot take them") as caught:
        PrefixTuning(num_virtual_tokens=2).attach(model)
    assert caught.value.remedy
    assert not [m for m in model.modules() if type(m).__name__ == "PrefixSite"]


def test_a_zero_start_without_the_network_keeps_all_virtual_tokens_alike() -> None:
    for options, alike in (({}, True), ({"prefix_projection": True}, False)):
        method, model = attached("llama", init_weights="zero", **options)
        train(method, model)
        flat = method.tensors(model)["prompt_embeddings"]
        assert flat.abs().max() > 0
        assert torch.allclose(flat, flat[:1].expand_as(flat), atol=1e-5) == alike


def test_a_prefix_longer_than_the_model_and_other_bad_values_are_refused() -> None:
    with pytest.raises(RecipeError, match="no position"):
        PrefixTuning(num_virtual_tokens=512).attach(tiny("llama"))
    for fields in ({"num_virtual_tokens": 0}, {"encoder_hidden_size": 0}, {"init_weights": "one"}):
        with pytest.raises(RecipeError):
            PrefixTuning(**fields)  # type: ignore[arg-type]
    for fields in ({"prefix_projection": True}, {"encoder_hidden_size": 8}):
        with pytest.raises(RecipeError, match="no network"):
            PTuningV2(**fields)  # type: ignore[arg-type]
    method, model = attached("llama")
    with pytest.raises(NotMergeable, match="no weight of the base"):
        method.merge(model)


def test_the_score_head_of_a_reward_model_trains_and_is_saved(tmp_path) -> None:
    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_labels=1,
                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)  # fmt: skip

    def scorer() -> nn.Module:
        torch.manual_seed(2)
        return AutoModelForSequenceClassification.from_config(config).eval()

    def read(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=TOKENS.clamp(min=1)).logits

    model, method = scorer(), PTuningV2(num_virtual_tokens=3)
    method.attach(model)
    for parameter in ours(model):
        parameter.data += 0.1
    assert set(method.tensors(model)) == {"prompt_embeddings", "base_model.score.weight"}
    save_adapter(tmp_path / "adapter", method, model, base_path="tiny")
    fresh = scorer()
    assert isinstance(load_adapter(tmp_path / "adapter", fresh), PTuningV2)
    assert torch.equal(read(fresh), read(model))
    theirs = peft.PeftModel.from_pretrained(scorer(), tmp_path / "adapter").eval()
    torch.testing.assert_close(read(theirs), read(model), atol=1e-5, rtol=1e-4)
