"""The trunk: three kinds of head agree, a swapped head is noticed, no scored tokens, tied weights, unpacked rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.models.head import find_head_map
from luthier.models.logprobs import HeadMap
from luthier.models.probe import probe_batch
from luthier.models.sites import AdaptedLinear, SavedModule, switched_off
from luthier.models.trunk import Trunk, TrunkFacts
from luthier.models.unpacked import leaves, paths_of
from tiny import tiny
from tiny_families import family


class Doubled(nn.Module):
    """The delta of an `AdaptedLinear`."""

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return 2 * y


class Nudged(nn.Module):
    """A stand-in for any site around the head: calls the base and adds something that trains."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(torch.full((base.in_features, 1), 0.01))
        self.up = nn.Parameter(torch.linspace(-1, 1, base.out_features)[None])

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down @ self.up


def run(model: nn.Module, batch: Batch, facts: TrunkFacts) -> tuple[Tensor, dict[str, Tensor], str]:
    trunk = Trunk(model, facts)
    try:
        model.zero_grad()
        value = trunk.logprobs(batch)
        (value * batch.weights_N).sum().backward()
        return (
            value.detach(),
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
            trunk.head,
        )
    finally:
        trunk.close()


def assert_same(a: tuple[Tensor, dict[str, Tensor], str], b: tuple[Tensor, dict[str, Tensor], str]) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=2e-6)
    assert a[1].keys() == b[1].keys()
    largest = max(g.abs().max() for g in b[1].values())
    for name, right in b[1].items():
        assert (a[1][name] - right).abs().max() <= 1e-5 * (right.abs().max() + 0.1 * largest), name


@pytest.mark.parametrize("path", ["forest", "unpacked"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "granite"])
def test_fused_and_whole_model_agree_gradients_of_tied_heads_included(name: str, path: str) -> None:
    model, batch = family(name), probe_batch(290)
    head_map = find_head_map(model, batch.tokens_T[:20])
    assert head_map is not None
    fused = run(model, batch, TrunkFacts(path=path, head_map=head_map))
    whole = run(model, batch, TrunkFacts(path="forest", head_map=None))
    assert (fused[2], whole[2]) == ("fused", "model")
    assert_same(fused, whole)


def test_head_maps_are_what_the_families_do() -> None:
    tokens = torch.arange(5, 25)
    found = {name: find_head_map(family(name), tokens) for name in ("llama", "gemma2", "cohere", "granite")}
    assert found["llama"] == HeadMap()
    assert found["gemma2"] == HeadMap(softcap=30.0)
    assert found["cohere"] == HeadMap(scale=0.0625)
    assert found["granite"] == HeadMap(scale=1 / 3)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_head_swapped_after_opening_goes_through_in_chunks(frozen: bool) -> None:
    model, batch = family("gemma2"), probe_batch(290, lengths=tuple(4 * n for n in (11, 9, 13, 8, 7, 12, 9, 10, 17)))
    assert batch.scored > 256  # more than one chunk
    trunk = Trunk(model, TrunkFacts(head_map=HeadMap(softcap=30.0)))
    assert trunk.head == "fused"
    trunk.close()
    model.requires_grad_(not frozen)
    model.lm_head = Nudged(model.lm_head)
    chunked = run(model, batch, TrunkFacts(head_map=HeadMap(softcap=30.0)))
    whole = run(model, batch, TrunkFacts(head_map=None))
    assert chunked[2] == "chunked"
    assert {"lm_head.down", "lm_head.up"} <= chunked[1].keys()
    assert_same(chunked, whole)


def test_a_trained_copy_and_a_site_that_is_off_are_plain_heads() -> None:
    model, batch = tiny("llama"), probe_batch(290)
    before = run(model, batch, TrunkFacts())
    model.lm_head = SavedModule(model.lm_head)
    with torch.no_grad():
        model.lm_head.copy.weight.mul_(2)
    copied = run(model, batch, TrunkFacts())
    assert copied[2] == "fused"
    assert_same(copied, run(model, batch, TrunkFacts(head_map=None)))
    assert "lm_head.copy.weight" in copied[1]
    model.lm_head = AdaptedLinear(model.lm_head.base_layer, Doubled())
    assert run(model, batch, TrunkFacts())[2] == "chunked"
    with switched_off(model):
        off = run(model, batch, TrunkFacts())
    assert off[2] == "fused"
    assert torch.equal(off[0], before[0])


def test_a_hook_on_the_head_is_honoured() -> None:
    model, batch = tiny("llama"), probe_batch(290)
    plain, _, _ = run(model, batch, TrunkFacts())
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)
    hooked, _, kind = run(model, batch, TrunkFacts())
    handle.remove()
    assert kind == "chunked"
    assert not torch.allclose(plain, hooked)


@pytest.mark.parametrize("path", ["forest", "unpacked"])
@pytest.mark.parametrize("head_map", [HeadMap(), None])
def test_no_scored_tokens_give_a_loss_of_zero_on_the_graph(path: str, head_map: HeadMap | None) -> None:
    model, batch = tiny("llama"), probe_batch(290)
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = dataclasses.replace(batch, scored_N=nothing, targets_N=nothing, weights_N=torch.zeros(0))
    value, gradients, _ = run(model, empty, TrunkFacts(path=path, head_map=head_map))
    assert value.shape == (0,)
    assert gradients
    assert all(g.abs().max() == 0 for g in gradients.values())


def test_scoring_without_gradients_equals_training() -> None:
    model, batch = tiny("qwen3_moe"), probe_batch(290)
    trunk = Trunk(model)
    with torch.no_grad():
        quiet = trunk.logprobs(batch)
    assert torch.equal(quiet, trunk.logprobs(batch).detach())


@pytest.mark.parametrize("scored", ["all", "leaves only", "one"])
def test_unpacked_rows_read_every_scored_token_once(scored: str) -> None:
    batch = probe_batch(290)
    keep = torch.ones(batch.scored, dtype=torch.bool)
    if scored != "all":
        first = [batch.forest.start[leaf] for leaf in leaves(batch.forest)]
        keep = torch.tensor([row in first for row in batch.scored_N.tolist()])
    if scored == "one":
        keep[keep.nonzero()[1:, 0]] = False
    fewer = dataclasses.replace(batch, scored_N=batch.scored_N[keep], targets_N=batch.targets_N[keep])
    read = []
    for paths in paths_of(fewer):
        assert len({len(path.rows) for path in paths}) == 1
        for path in paths:
            for index, offset in zip(path.scored, path.offsets, strict=True):
                assert path.rows[offset] == fewer.scored_N[index]
                read.append(index)
    assert sorted(read) == list(range(fewer.scored))


@pytest.mark.parametrize("name", ["mamba", "lfm2", "qwen3_next"])
def test_a_family_with_state_gives_each_row_what_it_gives_it_alone(name: str) -> None:
    model, batch = family(name), probe_batch(290)
    value, _, _ = run(model, batch, TrunkFacts(path="unpacked"))
    for leaf in leaves(batch.forest):
        rows = [row for s in batch.forest.chain(leaf) for row in range(batch.forest.start[s], batch.forest.end[s])]
        with torch.no_grad():
            logits = model(input_ids=batch.tokens_T[rows][None]).logits[0]
        expected = torch.log_softmax(logits[:-1], -1).gather(1, batch.tokens_T[rows][1:, None])[:, 0]
        its = [
            n
            for n, (row, target) in enumerate(zip(batch.scored_N.tolist(), batch.targets_N.tolist(), strict=True))
            if row in rows and rows.index(row) + 1 < len(rows) and batch.tokens_T[rows[rows.index(row) + 1]] == target
        ]
        places = [rows.index(batch.scored_N[n].item()) for n in its]
        torch.testing.assert_close(value[its], expected[places], rtol=1e-5, atol=1e-5)
