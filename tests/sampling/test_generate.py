"""Generation: batches equal single prompts, greedy equals argmax, seeds, stops, streaming, nothing disturbed."""

from __future__ import annotations

import pytest
import torch

from luthier.contracts.errors import ModelError
from luthier.models.load import load_tokenizer
from luthier.models.probe import open_trunk
from luthier.sampling.generate import SamplingSpec, generate, pads, stream, stream_tokens
from tiny import tiny, tiny_tokenizer
from tiny_families import family

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40], [50, 60, 70], [80, 81, 82], [12, 13, 14, 15]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gpt_oss", "mamba", "lfm2", "qwen3_next", "falcon_h1"])
def test_a_batch_gives_what_each_prompt_gives_alone_and_greedy_is_argmax(name: str) -> None:
    model = family(name)
    trunk = open_trunk(model)
    spec = SamplingSpec(max_new_tokens=6, batch=3)
    made = generate(model, None, PROMPTS, spec)
    assert [generate(model, None, [p], spec)[0] for p in PROMPTS] == made
    trunk.close()
    for prompt, new in zip(PROMPTS, made, strict=True):
        row = list(prompt)
        for token in new:
            with torch.no_grad():
                assert model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax() == token
            row.append(token)


def test_families_with_state_are_not_padded() -> None:
    assert {name: pads(family(name)) for name in ("llama", "gemma3", "mamba", "lfm2", "qwen3_next", "falcon_h1")} == {
        "llama": True, "gemma3": True, "mamba": False, "lfm2": False, "qwen3_next": False, "falcon_h1": False,
    }  # fmt: skip


def test_seeds_decide_and_the_global_state_does_not_move() -> None:
    model = tiny("llama")
    state = torch.get_rng_state()
    made = [generate(model, None, PROMPTS, SamplingSpec(12, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_ends_at_a_stop_token_which_is_not_shown() -> None:
    model = tiny("llama")
    free = generate(model, None, PROMPTS[:1], SamplingSpec(8))[0]
    stop = free[3]
    cut = generate(model, None, PROMPTS[:1], SamplingSpec(8, stop_ids=(stop,)))[0]
    assert cut == free[: free.index(stop)]
    assert list(stream_tokens(model, None, PROMPTS[0], SamplingSpec(8, stop_ids=(stop,)))) == cut


def test_streaming_equals_generating_and_may_be_left_early() -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    trunk = open_trunk(model)
    spec = SamplingSpec(20)
    tokens = generate(model, tokenizer, PROMPTS[:1], spec)[0]
    assert list(stream_tokens(model, tokenizer, PROMPTS[0], spec)) == tokens
    assert "".join(stream(model, tokenizer, PROMPTS[0], spec)) == tokenizer.decode(tokens, skip_special_tokens=True)
    left = stream_tokens(model, tokenizer, PROMPTS[0], SamplingSpec(400))
    next(left)
    left.close()
    assert model.config._attn_implementation == "luthier_forest"
    assert trunk.path == "forest"


def test_an_error_in_the_stream_reaches_the_reader() -> None:
    with pytest.raises(IndexError):
        list(stream_tokens(tiny("llama"), None, [10_000], SamplingSpec(4)))


def test_the_model_is_left_as_found() -> None:
    model = tiny("llama").train()
    model.lm_head.eval()
    modes = [m.training for m in model.modules()]
    config = model.generation_config
    generate(model, None, PROMPTS, SamplingSpec(2))
    assert [m.training for m in model.modules()] == modes
    assert model.generation_config is config


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ModelError, match="empty prompt"):
        generate(tiny("llama"), None, [[]], SamplingSpec(2))
    assert generate(tiny("llama"), None, [], SamplingSpec(2)) == []


def test_a_real_model_tells_a_story(shared_data) -> None:
    from transformers import AutoModelForCausalLM

    directory = shared_data("models/stories260K-hf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), load_tokenizer(directory)
    prompt = tokenizer("Once upon a time")["input_ids"]
    made = generate(model, tokenizer, [prompt], SamplingSpec(20))[0]
    assert "there was a little" in tokenizer.decode(made)
