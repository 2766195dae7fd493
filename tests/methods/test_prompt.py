"""Prompt tuning and P-tuning against PEFT: logits, gradients, files, generation; virtual tokens on every path."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.assembly import assemble
from luthier.contracts.batch import Forest
from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.data.stream import Stream, StreamSpec
from luthier.engine.state import load_trained, trained_tensors
from luthier.methods.p_tuning import PTuning
from luthier.methods.prefix import PrefixTuning
from luthier.methods.prompt import PromptTuning
from luthier.models.load import save_whole
from luthier.models.probe import open_trunk, probe_batch
from luthier.models.prompt_site import Grown
from luthier.models.recompute import Recomputed
from luthier.models.token_rows import attach_rows
from luthier.recipe.read import read_recipe
from luthier.sampling.generate import SamplingSpec, generate, room
from methods.rig import TOKENS, base, logits, loss, rows_as_batches, sample, shared_as_batches, train
from models import sweep
from tiny import tiny, tiny_tokenizer
from tiny_families import family as other_family
from tiny_families import logprobs_alone

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ("llama", "gpt2", "qwen2", "qwen3_moe")
LENGTH = 5
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "prompt": (PromptTuning, {}),
    "MLP": (PTuning, {}),
    "narrow MLP": (PTuning, {"encoder_hidden_size": 12}),
    "LSTM": (PTuning, {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}),
    "deep LSTM": (PTuning, {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3}),
}


def attached(family: str, kind: Any = PromptTuning, **options: Any) -> tuple[Any, nn.Module]:
    torch.manual_seed(4)
    model, method = base(family), kind(num_virtual_tokens=LENGTH, **options)
    method.attach(model)
    return method, model


def oracle_of(family: str, model: nn.Module, kind: Any = PromptTuning, **options: Any) -> Any:
    """PEFT's model with the same numbers in its encoder."""
    made = peft.PromptTuningConfig if kind is PromptTuning else peft.PromptEncoderConfig
    config = made(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, **options)
    oracle = peft.get_peft_model(base(family), config).eval()
    for theirs, mine in zip(oracle.prompt_encoder.parameters(), ours(model), strict=True):
        theirs.data.copy_(mine)
    return oracle


def ours(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def theirs(oracle: nn.Module) -> Tensor:
    return logits(oracle)[:, -TOKENS.shape[1] :]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_pefts(family: str, case: str) -> None:
    kind, options = CASES[case]
    _, model = attached(family, kind, **options)
    oracle = oracle_of(family, model, kind, **options)
    torch.testing.assert_close(logits(model), theirs(oracle), atol=1e-5, rtol=1e-4)
    loss(model).backward()
    scores = oracle(input_ids=TOKENS).logits[:, LENGTH:-1].flatten(0, 1)
    nn.functional.cross_entropy(scores, TOKENS[:, 1:].flatten()).backward()
    for mine, other in zip(ours(model), oracle.prompt_encoder.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_families_that_scale_their_embeddings_scale_virtual_ones_as_in_peft(family: str) -> None:
    """Gemma 2 inside the decoder, so virtual tokens too; Gemma 3 inside its embedding, so they are not."""
    torch.manual_seed(4)
    model = other_family(family)
    oracle = peft.get_peft_model(
        copy.deepcopy(model), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    ).eval()
    PromptTuning(num_virtual_tokens=LENGTH).attach(model)
    oracle.prompt_encoder["default"].embedding.weight.data.copy_(ours(model)[0])
    torch.testing.assert_close(logits(model), theirs(oracle), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_files_both_ways(case: str, tmp_path) -> None:
    kind, options = CASES[case]
    for family in FAMILIES:
        method, model = attached(family, kind, **options)
        save_adapter(tmp_path / family / "ours", method, model, base_path="tiny")
        reader = peft.PeftModel.from_pretrained(base(family), tmp_path / family / "ours").eval()
        torch.testing.assert_close(theirs(reader), logits(model), atol=1e-5, rtol=1e-4)
        oracle = oracle_of(family, model, kind, **options)
        oracle.save_pretrained(tmp_path / family / "theirs")
        loaded, notes = base(family), []
        assert type(load_adapter(tmp_path / family / "theirs", loaded, notes=notes)) is kind
        assert not [note for note in notes if "virtual" in note or "encoder" in note]
        torch.testing.assert_close(logits(loaded), theirs(oracle), atol=1e-5, rtol=1e-4)


def test_only_what_the_network_gives_is_saved_and_a_checkpoint_keeps_the_network(tmp_path) -> None:
    method, model = attached("llama", PTuning)
    train(method, model)
    assert {name: tuple(t.shape) for name, t in method.tensors(model).items()} == {"prompt_embeddings": (LENGTH, 64)}
    save_adapter(tmp_path / "adapter", method, model, base_path="tiny")
    fresh, twin = base("llama"), base("llama")
    load_adapter(tmp_path / "adapter", fresh)
    assert [tuple(p.shape) for p in ours(fresh)] == [(LENGTH, 64)]
    torch.manual_seed(9)
    method.attach(twin)
    load_trained(twin, copy.deepcopy(trained_tensors(model)))
    assert len(ours(twin)) == 7
    assert torch.equal(logits(fresh), logits(model))
    assert torch.equal(logits(twin), logits(model))


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
        assert out[0, -8:].tolist() == new
        for token in new:  # and without a cache
            assert oracle(input_ids=torch.tensor([prompt])).logits[0, -1].argmax() == token
            prompt = [*prompt, token]


@pytest.mark.parametrize("family", ["llama", "gpt2", "stories"])
def test_forest_in_the_order_of_a_run_is_native(family: str) -> None:
    """The trunk opened before the method attaches, the last layer on scored rows, trees and plain rows."""
    model = base(family)
    trunk = open_trunk(model)
    torch.manual_seed(4)
    PromptTuning(num_virtual_tokens=LENGTH).attach(model)
    twin = copy.deepcopy(model)
    native = open_trunk(twin, attention="unpacked")
    for batch in (rows_as_batches()[0], shared_as_batches()[0]):
        found, expected = trunk.logprobs(batch), native.logprobs(batch)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        mine, other = (torch.autograd.grad(x.sum(), ours(m)) for x, m in ((found, model), (expected, twin)))
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3", "gpt_oss", "llama4", "mistral", "deepseek_v3", "cohere", "granite", "diffllama",
             "stablelm", "roberta", "mamba", "lfm2", "qwen3_next", "falcon_h1", "gptj"]
)  # fmt: skip
def test_other_families_see_them_alike_on_every_path(name: str) -> None:
    """Windows, chunks, states and recurrent layers too: virtual tokens are ordinary rows."""
    model = other_family(name)
    trunk = open_trunk(model)
    torch.manual_seed(4)
    PromptTuning(num_virtual_tokens=LENGTH, prompt_tuning_init="SAMPLE_VOCAB").attach(model)
    twin, batch = copy.deepcopy(model), shared_as_batches()[0]
    native = open_trunk(twin, attention="unpacked")
    found, expected = trunk.logprobs(batch), native.logprobs(batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    mine, other = (torch.autograd.grad(x.sum(), ours(m)) for x, m in ((found, model), (expected, twin)))
    torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)
    prompts = [[5, 6, 7, 8, 9], [40, 41], [50, 60, 70]]
    made = generate(model, None, prompts, SamplingSpec(max_new_tokens=4, batch=3))
    assert [generate(model, None, [p], SamplingSpec(max_new_tokens=4))[0] for p in prompts] == made


@pytest.mark.parametrize("kind", [PromptTuning, PrefixTuning])
@pytest.mark.parametrize("name", ["opt", "bloom", "mpt", "gpt_neo", "falcon"])
def test_families_of_other_builds_see_them_alike_too(name: str, kind: Any) -> None:
    """OPT's head reaches past its decoder; biases and windows that count keys meet padding (MPT, BLOOM, GPT-Neo)."""
    model = sweep.build(name).eval()
    trunk = open_trunk(model)
    torch.manual_seed(4)
    kind(num_virtual_tokens=LENGTH).attach(model)
    twin, batch = copy.deepcopy(model), probe_batch(60, (-1, 0, 0, -1), (6, 4, 3, 5))
    with torch.no_grad():
        found, expected = trunk.logprobs(batch), open_trunk(twin, attention="unpacked").logprobs(batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    trunk.close()
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    made = generate(model, None, prompts, SamplingSpec(max_new_tokens=4))
    assert [generate(model, None, [p], SamplingSpec(max_new_tokens=4))[0] for p in prompts] == made
    for row, new in zip(prompts, made, strict=True):
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([[*row, *new]]), use_cache=False).logits[0, len(row) - 1 : -1]
        assert whole.argmax(-1).tolist() == new


@pytest.mark.parametrize("attention", ["forest", "unpacked"])
def test_recompute_of_activations_changes_nothing(attention: str) -> None:
    _, model = attached("llama", PTuning)
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


@pytest.mark.parametrize("kind", [PromptTuning, PrefixTuning])
def test_the_length_up_to_which_a_family_packs_counts_them(kind: Any) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 40,
    }  # fmt: skip
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=80)
    trunk, batch = open_trunk(model), probe_batch(290, (-1, 0, 0, -1), (20, 12, 16, 38))
    assert trunk.facts.limits.allow(batch)
    kind(num_virtual_tokens=LENGTH).attach(model)
    assert not trunk.facts.limits.allow(batch, LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(trunk.logprobs(batch), logprobs_alone(model, batch), atol=1e-5, rtol=1e-5)


def test_a_forest_grows_in_front_of_its_roots() -> None:
    grown = Grown.of(Forest((0, 3, 5, 7), (3, 5, 7, 8), (-1, 0, 0, -1)), 2, torch.device("cpu"))
    assert (grown.forest.start, grown.forest.end) == ((0, 5, 7, 9), (5, 7, 9, 12))
    assert grown.source.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 9]
    assert grown.where_T.tolist() == [2, 3, 4, 5, 6, 7, 8, 11]
    positions = grown.positions(torch.tensor([0, 1, 2, 3, 4, 3, 4, 0]), 2)
    assert positions.tolist() == grown.forest.positions_T().tolist()


def test_starts_from_tokens_and_texts() -> None:
    weight = base("llama").get_input_embeddings().weight
    _, model = attached("llama", prompt_tuning_init="SAMPLE_VOCAB")
    assert all((row == weight).all(1).any() for row in ours(model)[0])
    told = PromptTuning(num_virtual_tokens=LENGTH, prompt_tuning_init="TEXT", prompt_tuning_init_text="Sum:")
    with pytest.raises(RecipeError, match="read into tokens"):
        told.attach(base("llama"))
    read = told.with_texts(lambda words: list(words.encode()))
    model = base("llama")
    read.attach(model)
    assert torch.equal(ours(model)[0], weight[[83, 117, 109, 58, 83]])
    assert PromptTuning().with_texts(lambda words: [1]) == PromptTuning()
    with pytest.raises(RecipeError, match="read into tokens"):
        PromptTuning(prompt_tuning_init="TEXT", init_token_ids=(300,)).attach(base("llama"))


def test_bad_fields_and_merging_are_refused() -> None:
    for kind, fields in (
        (PromptTuning, {"num_virtual_tokens": 0}), (PromptTuning, {"prompt_tuning_init": "TEXT"}),
        (PromptTuning, {"prompt_tuning_init_text": "words"}), (PromptTuning, {"prompt_tuning_init": "text"}),
        (PTuning, {"encoder_reparameterization_type": "GRU"}), (PTuning, {"encoder_dropout": 1.0}),
        (PTuning, {"encoder_num_layers": 0}), (PTuning, {"encoder_hidden_size": 0}),
    ):  # fmt: skip
        with pytest.raises(RecipeError) as caught:
            kind(**fields)
        assert caught.value.remedy
    method, model = attached("llama")
    with pytest.raises(NotMergeable, match="no weight of the base"):
        method.merge(model)
    with pytest.raises(RecipeError, match="no position"):
        PromptTuning(num_virtual_tokens=512).attach(tiny("llama"))


def test_counts() -> None:
    assert PromptTuning().footprint(attached("llama")[1]).trainable == LENGTH * 64
    count = sum(p.numel() for p in PTuning(encoder_hidden_size=32).encoder(64).parameters())
    assert count == 20 * 64 + (64 * 32 + 32) + (32 * 32 + 32) + (32 * 64 + 64)


def test_rows_of_added_tokens_train_beside_them() -> None:
    _, model = attached("llama")
    attach_rows(model, [7, 8])
    trunk, (packed, alone) = open_trunk(model), rows_as_batches()
    torch.testing.assert_close(trunk.logprobs(packed), torch.cat([trunk.logprobs(b) for b in alone]))
    assert len(ours(model)) == 3


def test_the_packer_counts_them() -> None:
    samples = [sample(list(range(n)), i) for i, n in enumerate((10, 20, 30, 40))]
    plain, stream = (
        Stream(samples, StreamSpec(rows_per_step=4, microbatch_tokens=70, reserved_per_root=n)) for n in (0, 20)
    )
    assert [len(plain.step(0)), len(stream.step(0))] == [2, 3]
    assert all(batch.tokens + 20 * len(batch.samples) <= 73 for batch in stream.step(0))
    assert sorted(plain.rows(0)) == sorted(stream.rows(0))
    assert plain.tokens_per_epoch == stream.tokens_per_epoch == 100


def test_a_run_counts_them_and_reads_the_text(tmp_path) -> None:
    save_whole(tiny("llama"), tiny_tokenizer(), None, tmp_path / "base")
    rows = [{"text": "abcdefgh" * n} for n in (2, 5, 80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tmp_path}/base\nmethod: lora\ndata: {{train: {tmp_path}/rows.jsonl, max_tokens: 600}}\n"
        f"train: {{max_steps: 1}}\noutput_dir: {tmp_path}/out\n"
    )
    fields = {"num_virtual_tokens": 6, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Sort"}
    recipe, _ = read_recipe(str(tmp_path / "recipe.yaml"))
    recipe = recipe.model_copy(update={"method": {"name": "prompt", **fields}})
    work = assemble(recipe)
    assert work.method.init_token_ids == tuple(tiny_tokenizer()("Sort")["input_ids"])
    assert any("506 is used" in note and "6 of them" in note for note in work.notes)
    assert work.stream.spec.reserved_per_root == 6
    assert room(work.loaded.model, 500, 100) == 512 - 6 - 500
