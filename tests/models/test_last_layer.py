"""The last layer on scored rows: the same numbers and gradients, fewer rows, and whole where it would be wrong."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.methods.lora import LoRA
from luthier.models.attention import ForestUnsupported, Kept
from luthier.models.probe import open_trunk, probe_batch
from luthier.models.recompute import Recomputed
from luthier.models.trunk import Trunk, TrunkFacts
from tiny import VOCABULARY, tiny
from tiny_families import family

SCORED = TrunkFacts(last_layer="scored rows")


def part(batch: Batch, chosen: Tensor) -> Batch:
    per_token = ("scored_N", "targets_N", "weights_N", "sequence_N")
    return replace(batch, **{name: getattr(batch, name)[chosen] for name in per_token})


def answers(share: float = 0.5) -> Batch:
    """The probe's forest; of every segment, the last `share` of the scored tokens."""
    batch = probe_batch(VOCABULARY)
    ends = torch.tensor(batch.forest.end)[
        torch.searchsorted(torch.tensor(batch.forest.end), batch.scored_N, right=True)
    ]
    lengths = torch.tensor([end - start for start, end in zip(batch.forest.start, batch.forest.end, strict=True)])
    own = lengths[torch.searchsorted(torch.tensor(batch.forest.end), batch.scored_N, right=True)]
    return part(batch, ends - batch.scored_N <= share * own)


def run(model: nn.Module, batch: Batch, facts: TrunkFacts) -> tuple[Tensor, dict[str, Tensor]]:
    trunk = Trunk(model, facts)
    try:
        model.zero_grad()
        logprobs_N = trunk.logprobs(batch)
        (logprobs_N * batch.weights_N).sum().backward()
        return logprobs_N.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    finally:
        trunk.close()


def assert_same(mine: tuple[Tensor, dict[str, Tensor]], whole: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(mine[0], whole[0], rtol=1e-5, atol=2e-6)
    assert mine[1].keys() == whole[1].keys()
    largest = max(g.abs().max() for g in whole[1].values())
    for name, right in whole[1].items():
        assert (mine[1][name] - right).abs().max() <= 1e-5 * (right.abs().max() + 0.1 * largest), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "deepseek_v3"])
def test_adapters_get_the_same_values_and_gradients(name: str, recompute: bool) -> None:
    model, batch = family(name), answers()
    LoRA(r=4, init_lora_weights=False).attach(model)
    model.train()
    if recompute:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Recomputed(model)
    assert_same(run(model, batch, SCORED), run(model, batch, TrunkFacts()))


def test_only_the_last_layer_and_only_after_attention_sees_fewer_rows() -> None:
    model, batch = tiny("llama"), answers()
    seen: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj", "down_proj")):
            module.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, []).append(out.shape[1]))
    kept = len(batch.scored_N.unique())
    logprobs_N, _ = run(model, batch, replace(SCORED, fused=False))  # no other calls than the model's own
    *first, last = sorted({name.split(".")[2] for name in seen})
    rows = {name.split(".", 2)[2]: counts for name, counts in seen.items()}
    assert kept < 0.6 * batch.tokens
    assert all(rows[f"{layer}.mlp.down_proj"] == [batch.tokens] for layer in first)
    assert rows[f"{last}.self_attn.q_proj"] == [batch.tokens, kept]
    assert rows[f"{last}.self_attn.o_proj"] == rows[f"{last}.mlp.down_proj"] == [kept]
    assert len(logprobs_N) == batch.scored > kept  # leaves of one parent share a row


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "llama4", "deepseek_v3"])
def test_families_where_the_probe_shows_it(name: str) -> None:
    facts = open_trunk(family(name)).facts
    assert (facts.last_layer, facts.last_layer_reason) == ("scored rows", "")
    assert facts.evidence["last_layer_gradients"] < 2e-4


def test_a_layer_that_attends_twice_or_reads_its_shape_again_stays_whole() -> None:
    twice = open_trunk(family("diffllama"))
    assert (twice.path, twice.facts.last_layer) == ("forest", "whole")
    assert "attends 2 times" in twice.facts.last_layer_reason
    twice.close()
    with pytest.raises(ForestUnsupported, match="attends 2 times"):
        run(family("diffllama"), answers(), SCORED)
    shaped = open_trunk(family("gpt2")).facts
    assert (shaped.path, shaped.last_layer) == ("forest", "whole")
    assert "RuntimeError" in shaped.last_layer_reason


def test_whole_where_little_would_be_left_out_and_after_closing() -> None:
    model, batch = tiny("llama"), probe_batch(VOCABULARY)
    layer = model.model.layers[-1]
    rows: list[int] = []
    layer.mlp.register_forward_hook(lambda m, args, out: rows.append(out.shape[1]))
    run(model, batch, SCORED)
    trunk = Trunk(model, SCORED)
    trunk.close()
    assert not layer._forward_pre_hooks and not layer._forward_hooks
    run(model, answers(), TrunkFacts())
    assert rows == [batch.tokens, batch.tokens]


def test_kept_rows_by_segment() -> None:
    forest = probe_batch(VOCABULARY, parents=(-1, 0, -1), lengths=(4, 3, 2)).forest
    kept = Kept.of(forest, torch.tensor([3, 3, 8, 1]))
    assert kept.rows_K.tolist() == [1, 3, 8]
    assert kept.lengths == [2, 0, 1]
    assert [rows.tolist() for rows in kept.local] == [[1, 3], [], [1]]
    assert kept.place(torch.tensor([3, 3, 8, 1])).tolist() == [1, 1, 2, 0]
