"""Limits: rows that change their company only when long pack below that length and go path by path beyond it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from luthier.models.limits import Limits, OwnPositions, counts_after_padding, limits_of, padding_of
from luthier.models.probe import open_trunk, probe_batch
from tiny import tiny
from tiny_families import family, logprobs_alone

LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 40,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONG = ((-1, 0, 0, -1), (30, 25, 9, 20))  # one path is longer than 40


@pytest.mark.parametrize("rope", [LONG_ROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rotary_scaling_packs_up_to_its_length_and_goes_path_by_path_beyond(rope: dict[str, object]) -> None:
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=40)
    trunk = open_trunk(model)
    assert (trunk.path, trunk.facts.limits.positions) == ("forest", 40)
    long, short = probe_batch(290, *LONG), probe_batch(290, (-1, 0, 0, -1), (20, 12, 20, 35))
    assert trunk.facts.limits.allow(short)
    assert not trunk.facts.limits.allow(long)
    unlimited = replace(trunk.facts, limits=Limits())
    with torch.no_grad():
        for batch in (short, long):
            torch.testing.assert_close(trunk.logprobs(batch), logprobs_alone(model, batch), atol=1e-5, rtol=1e-5)
        trunk.facts = unlimited
        if rope is LONG_ROPE:  # shown to be needed: packed, the long row changes the short one
            assert (trunk.logprobs(long) - logprobs_alone(model, long)).abs().max() > 1e-3


def test_temperature_tuning_packs_below_its_scale() -> None:
    model = family("llama4")
    for layer in model.model.layers:
        layer.self_attn.attn_temperature_tuning, layer.self_attn.floor_scale = True, 100
    model.config.attn_temperature_tuning, model.config.floor_scale = True, 100
    trunk = open_trunk(model)
    assert (trunk.path, trunk.facts.limits.rows) == ("forest", 100)
    assert "temperature" in trunk.facts.limits.why
    short, long = probe_batch(290), probe_batch(290, (-1, 0, 0, -1), (60, 30, 55, 110))
    with torch.no_grad():
        for batch in (short, long):
            torch.testing.assert_close(trunk.logprobs(batch), logprobs_alone(model, batch), atol=1e-5, rtol=1e-5)
        trunk.facts = replace(trunk.facts, limits=Limits())
        assert (trunk.logprobs(long) - logprobs_alone(model, long)).abs().max() > 1e-4


def test_a_path_by_path_batch_recomputes_its_layers_alike() -> None:
    """Checkpointed layers run again in the backward pass, after the context was left."""
    model = tiny("llama", rope_parameters=LONG_ROPE, max_position_embeddings=400)
    trunk, batch = open_trunk(model), probe_batch(290, *LONG)
    plain = torch.autograd.grad(trunk.logprobs(batch).sum(), model.model.layers[0].self_attn.q_proj.weight)[0]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    again = torch.autograd.grad(trunk.logprobs(batch).sum(), model.model.layers[0].self_attn.q_proj.weight)[0]
    torch.testing.assert_close(again, plain)


def test_positions_that_begin_after_the_padding_index_skip_padding() -> None:
    model = family("roberta")
    trunk = open_trunk(model)
    assert (trunk.path, trunk.facts.limits.padding) == ("forest", 1)
    batch = probe_batch(290)
    batch.tokens_T[torch.tensor([3, 14, 15, 40, 66])] = 1  # in a root, in inner segments, in leaves
    positions_T = trunk.facts.limits.positions_T(batch)
    for start, first in zip(batch.forest.start, batch.forest.first_position, strict=True):
        if batch.tokens_T[start] != 1:
            assert positions_T[start] <= first + 2
    with torch.no_grad():
        torch.testing.assert_close(trunk.logprobs(batch), logprobs_alone(model, batch), atol=1e-5, rtol=1e-5)


def test_what_counts_in_its_own_way_is_told_apart() -> None:
    row = torch.arange(3, 27)
    assert not counts_after_padding(family("gemma2"), row)
    assert not counts_after_padding(family("mamba"), row)  # takes no positions
    assert counts_after_padding(family("roberta"), row)
    model = family("roberta")
    assert padding_of(model) == 1
    model.roberta.embeddings.padding_idx = 5  # numbers from 6, as neither its table nor its configuration says
    with pytest.raises(OwnPositions):
        counts_after_padding(model, row)
    trunk = open_trunk(model)
    assert (trunk.path, trunk.reason) == ("unpacked", "it numbers the tokens of a row in a way of its own")


def test_published_settings() -> None:
    assert limits_of(transformers.LlamaConfig()) == Limits()
    assert limits_of(transformers.Llama4TextConfig()).rows == 8192
    factors = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 48, long_factor=[1.0] * 48)
    phi = transformers.Phi3Config(rope_parameters=factors, original_max_position_embeddings=4096)
    assert limits_of(phi).positions == 4096
