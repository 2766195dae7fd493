"""ReFT beyond the laws: variants, twins, orthonormal rows, and where edits go: packed, kept, recomputed, generated."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.batch import Batch
from luthier.contracts.errors import ModelError, NotMergeable, RecipeError
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.pack import collate
from luthier.engine.gate_numbers import unshared
from luthier.engine.memory import checkpoint_activations
from luthier.methods.direft import DiReFT
from luthier.methods.loreft import LoReFT
from luthier.models import reft
from luthier.models.blocks import blocks
from luthier.models.probe import open_trunk
from luthier.models.reft import Intervention, ReFT
from luthier.models.sites import AdaptedModule, detach, sites
from luthier.models.trunk import Trunk, TrunkFacts
from luthier.sampling.generate import SamplingSpec, generate
from methods.rig import TOKENS, base, logits, loss, train
from tiny import VOCABULARY

VARIANTS = [LoReFT(variant=v) for v in LoReFT.variants] + [DiReFT(variant=v) for v in DiReFT.variants]
OTHERS = [
    LoReFT(positions="f3", dropout=0.0), LoReFT(positions="l2", layers=(1,)), LoReFT(positions="all", r=2),
    LoReFT(positions="f2+l5", share_weights=True, layers=(0,)), DiReFT(act_fn="gelu", r=8),
]  # fmt: skip
ALL = [*VARIANTS, *OTHERS]
named = lambda method: f"{method.variant}-{method.positions}-{method.act_fn}"


def attached(method: LoReFT, family: str = "llama", steps: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = base(family)
    method.attach(model)
    train(method, model, steps)
    return model


def batch_of(*sizes: tuple[int, int], seed: int = 8) -> Batch:
    """Rows of (prompt, answer) tokens."""
    made = torch.Generator().manual_seed(seed)
    samples = []
    for index, (prompt, answer) in enumerate(sizes):
        tokens = torch.randint(0, 256, (prompt + answer,), generator=made).tolist()
        piece = Piece(tokens, [0.0] * prompt + [1.0] * answer)
        samples.append(Sample((piece,), Source("rows.jsonl", index + 1), id=index))
    return collate(samples)


LONG = ((16, 3), (5, 4), (1, 6), (21, 2))


def gradients(model: nn.Module, total: Tensor) -> list[Tensor]:
    grown = [p for p in model.parameters() if p.requires_grad]
    return [torch.zeros_like(p) if g is None else g
            for p, g in zip(grown, torch.autograd.grad(total, grown, allow_unused=True), strict=True)]  # fmt: skip


def close(found: Any, expected: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("act", [None, torch.tanh])
def test_the_short_formula_is_the_plain_one(act: Any) -> None:
    torch.manual_seed(1)
    given = [torch.randn(*shape, requires_grad=True) for shape in ((7, 12), (3, 12), (3, 12), (3,))]
    slope = torch.randn(7, 12)
    made = []
    for formula in (reft.loreft, reft.loreft_plain):
        edit = formula(*given, act)
        made.append((edit, *torch.autograd.grad((edit * slope).sum(), given)))
    close(made[0], made[1])


def test_some_rows_are_edited_as_all_rows_chosen_by_a_mask() -> None:
    torch.manual_seed(1)
    part = Intervention("loreft", 3, 12, torch.device("cpu"))
    y, slope, rows = torch.randn(9, 12, requires_grad=True), torch.randn(9, 12), torch.tensor([7, 0, 4])
    made = []
    for how in (reft.edit_rows, reft.edit_rows_plain):
        out = how(y, rows, part)
        made.append((out, *torch.autograd.grad((out * slope).sum(), [y, *part.parameters()])))
    close(made[0], made[1])
    assert torch.equal(made[0][0][[1, 2, 3, 5, 6, 8]], y[[1, 2, 3, 5, 6, 8]])


def test_the_nearest_orthonormal_rows_are_those_of_singular_values() -> None:
    torch.manual_seed(1)
    given = torch.randn(5, 4, 16)
    found = reft.orthonormal(given)
    close(found, reft.orthonormal_plain(given), atol=1e-6)
    close(found @ found.mT, torch.eye(4).expand(5, 4, 4), atol=1e-6)
    close(torch.stack([reft.orthonormal(one) for one in given]), found, atol=1e-6)


@pytest.mark.parametrize("method", VARIANTS, ids=named)
def test_rows_stay_orthonormal_where_the_variant_says_so(method: LoReFT) -> None:
    saved = method.tensors(attached(method))
    rows = [tensor for name, tensor in saved.items() if name.endswith(".R")]
    assert len(rows) == 4
    off = max(float((r @ r.T - torch.eye(4)).abs().max()) for r in rows)
    assert (off < 1e-6) == (method.variant not in reft.FREE)


def test_what_is_saved_is_the_matrix_that_is_used() -> None:
    method = LoReFT()
    model = attached(method)
    saved = method.tensors(model)
    assert torch.equal(saved["base_model.model.model.layers.1.suffix.R"], _part(model, 1, "suffix").R)
    assert {name.rpartition(".")[2] for name in saved} == {"R", "W", "b"}


def _part(model: nn.Module, layer: int, place: str) -> Intervention:
    found = model.model.layers[layer].delta.parts[place]
    assert isinstance(found, Intervention)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ALL, ids=named)
def test_every_variant_packed_is_each_row_alone(method: LoReFT, family: str) -> None:
    model = attached(method, family)
    whole, alone = batch_of(*LONG), [batch_of(*LONG[: i + 1]) for i in range(len(LONG))]
    found = {}
    for attention in ("forest", "unpacked"):
        trunk = open_trunk(model, attention=attention)
        with torch.no_grad():
            found[attention] = trunk.logprobs(whole)
            apart = torch.cat([trunk.logprobs(b)[-size:] for b, (_, size) in zip(alone, LONG, strict=True)])
        close(found[attention], apart)
        trunk.close()
    close(found["forest"], found["unpacked"])


@pytest.mark.parametrize("method", ALL, ids=named)
def test_every_variant_saves_and_loads_exactly(method: LoReFT, tmp_path) -> None:
    model, fresh = attached(method), base("llama")
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    assert load_adapter(tmp_path / "a", fresh) == method
    assert torch.equal(logits(fresh), logits(model))
    (tmp_path / "a" / "luthier.json").unlink()
    with pytest.raises(ModelError, match=r"luthier\.json"):
        load_adapter(tmp_path / "a", base("llama"))


@pytest.mark.parametrize("method", ALL, ids=named)
def test_every_variant_learns(method: LoReFT) -> None:
    model = attached(method, steps=0)
    before = loss(model).item()
    train(method, model, 6)
    assert loss(model).item() < before


def test_edits_are_where_they_should_be() -> None:
    """Layer 0 only: its output differs from the base's at 7 + 7 rows of the prompt and nowhere else."""
    model = attached(LoReFT(layers=(0,)))
    seen: list[Tensor] = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        trunk, batch = Trunk(model), batch_of((20, 4), (2, 3))
        trunk.logprobs(batch)
        with LoReFT().off(model):
            trunk.logprobs(batch)
    handle.remove()
    changed = (seen[0] != seen[1]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [*range(7), *range(13, 20), 24, 25]


def test_rows_that_are_kept_in_the_last_layer_get_the_same_edits() -> None:
    for opened_first in (False, True):
        torch.manual_seed(0)
        model, method, facts = base("llama"), LoReFT(), TrunkFacts(last_layer="scored rows")
        trunk = Trunk(model, facts) if opened_first else None
        method.attach(model)
        trunk = trunk or Trunk(model, facts)
        batch, made = batch_of(*LONG), []
        for kept in (True, False):
            if not kept:
                trunk.close()
                trunk = Trunk(model)
            logprobs = trunk.logprobs(batch)
            made.append((logprobs, *gradients(model, logprobs.sum())))
        assert trunk._restricted is None
        close(made[0], made[1])
        assert _part(model, 1, "suffix").R.grad is None
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        last = dict(zip(names, made[0][1:], strict=True))
        assert max(float(g.abs().max()) for name, g in last.items() if "layers.1." in name and "suffix" in name) > 0


@pytest.mark.parametrize("attention", ["forest", "unpacked"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_activations_give_the_same_gradients(family: str, attention: str) -> None:
    method = LoReFT(dropout=0.0)
    model, batch, made = attached(method, family), batch_of(*LONG), []
    model.train()
    for recompute in (False, True):
        trunk = open_trunk(model, attention=attention)
        if recompute:
            assert checkpoint_activations(model)
            assert any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())
        logprobs = trunk.logprobs(batch)
        made.append((logprobs, *gradients(model, logprobs.sum())))
        trunk.close()
    close(made[0], made[1])


def test_a_site_that_is_made_to_run_again_in_backward_says_so() -> None:
    """A checkpoint around the site instead of inside it: the facts of the pass are gone, and nothing is guessed."""
    model = attached(LoReFT())
    site = model.model.layers[0]
    assert isinstance(site, AdaptedModule)
    plain = site.forward
    site.forward = lambda *args, **kwargs: checkpoint(plain, *args, use_reentrant=False, **kwargs)
    total = Trunk(model).logprobs(batch_of(*LONG)).sum()
    with pytest.raises(ModelError, match="checkpoint_activations"):
        total.backward()


def tree_of(root: list[int], *answers: tuple[list[int], list[float]]) -> tuple[Batch, list[Batch]]:
    """One prompt with its answers as a tree, and each path as a row alone."""
    source, count = Source("t.jsonl", 4), len(answers)
    leaves = [Piece(tokens, weights, parent=0) for tokens, weights in answers]
    pieces = (Piece(root, [0.0] * len(root)), *leaves)
    whole = [Piece([*root, *tokens], [0.0] * len(root) + weights) for tokens, weights in answers]
    tree = collate([Sample(pieces, source, id=0, sequences=tuple(range(1, count + 1)))])
    return tree, [collate([Sample((piece,), source, id=0)]) for piece in whole]


def at_ends(batch: Batch) -> Batch:
    """What `Trunk.scores` reads: the last row of every sequence."""
    each_Q = torch.arange(len(batch.last_Q))
    return replace(batch, scored_N=batch.last_Q, targets_N=batch.tokens_T[batch.last_Q], sequence_N=each_Q)


DISAGREE = {
    "an answer begins with an untrained token": ([0.0] * 9, [1.0] * 3, [0.0, 1.0, 1.0]),
    "the prompt is scored": ([0.0] + [1.0] * 8, [1.0] * 3, [1.0] * 3),
}


@pytest.mark.parametrize("attention", ["forest", "unpacked"])
@pytest.mark.parametrize("weights", DISAGREE.values(), ids=list(DISAGREE))
def test_sequences_that_disagree_about_a_prompt_run_alone(weights: tuple[list[float], ...], attention: str) -> None:
    root, one, other = weights
    model = attached(LoReFT())
    scored = [0] if any(root) else []
    tokens = [5, 9, 8, 5, 6, 7, 8, 9, 4]
    pieces = (Piece(tokens, root), Piece([6, 7, 8], one, parent=0), Piece([7, 7, 3], other, parent=0))
    sample = Sample(pieces, Source("t.jsonl", 4), id=0, sequences=(1, 2, *scored))
    trunk = open_trunk(model, attention=attention)
    found = trunk.logprobs(collate([sample]))
    apart = torch.cat([trunk.logprobs(collate([one])) for one in unshared(sample)])
    close(found, apart)
    slopes = torch.linspace(0.5, 1.5, len(found))
    close(gradients(model, found.dot(slopes)), gradients(model, apart.dot(slopes)))


def test_a_score_is_read_after_a_prompt_of_the_whole_row() -> None:
    """In a tree whose answers are shorter than the last seven tokens, alone, and in a native call."""
    model = attached(LoReFT())
    root, answers = [5, 6, 7, 8, 9, 10], ([11, 12, 13], [14, 15, 16, 17])
    tree, alone = tree_of(root, *((answer, [1.0] * len(answer)) for answer in answers))
    with torch.no_grad():
        native = torch.stack([model(input_ids=torch.tensor([root + answer])).logits[0, -1] for answer in answers])
        trunk = Trunk(model)
        close(trunk.logits(at_ends(tree)), native)
        close(torch.cat([trunk.logits(at_ends(one)) for one in alone]), native)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_continues_as_training_saw_it(family: str) -> None:
    """Prompts of several lengths, padded on the left: each greedy token is the likeliest one of the packed pass."""
    model = attached(LoReFT(), family, steps=6)
    prompts = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 17, 9)]
    made = generate(model, None, prompts, SamplingSpec(max_new_tokens=6))
    for prompt, answer in zip(prompts, made, strict=True):
        assert len(answer) == 6
        piece = Piece([*prompt, *answer], [0.0] * len(prompt) + [1.0] * 6)
        with torch.no_grad():
            trunk = Trunk(model)
            found = trunk.logits(collate([Sample((piece,), Source("g.jsonl", 1), id=0)]))
            trunk.close()
        assert found.argmax(-1).tolist() == answer
    with LoReFT().off(model):
        assert generate(model, None, prompts, SamplingSpec(max_new_tokens=6)) != made


def test_all_positions_need_no_prompt() -> None:
    model = attached(LoReFT(positions="all"))
    assert {type(site) for site in sites(model)} == {AdaptedModule}
    layer = model.model.layers[0]
    assert isinstance(layer.delta, ReFT)
    assert layer.delta(None, torch.ones(1, 3, 64)).shape == (1, 3, 64)


def test_dropout_falls_on_the_edit_alone() -> None:
    method = LoReFT(dropout=0.5, layers=(0,))
    model = attached(method).train()
    delta, y = model.model.layers[0].delta, torch.randn(14, 64)
    part = delta.parts["prefix"]
    kept = (part(y) - y).abs() > 1e-7
    assert 0.3 < kept.float().mean() < 0.7
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    close(part(y), y + reft.loreft_plain(y, part.R, part.W, part.b))


def test_a_bf16_stream_is_edited_in_fp32_and_rounded_once() -> None:
    part = Intervention("loreft", 4, 64, torch.device("cpu"))
    h = torch.randn(5, 64).bfloat16()
    expected = (h.float() + reft.loreft(h.float(), part.R, part.W, part.b)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(part(h), expected)


def test_sizes() -> None:
    model = base("llama")
    method = LoReFT(r=3)
    method.attach(model)
    assert method.footprint(model).trainable == 2 * 2 * (2 * 3 * 64 + 3)
    for half in (LoReFT(r=3, share_weights=True), LoReFT(r=3, positions="f7"), LoReFT(r=3, layers=(1,))):
        other = base("llama")
        half.attach(other)
        assert 2 * half.footprint(other).trainable == method.footprint(model).trainable


def test_layers_are_found_as_blocks_finds_them() -> None:
    for family in ("llama", "gpt2", "qwen3_moe"):
        model = base(family)
        expected = [block.path for block in blocks(model)]
        method = LoReFT()
        method.attach(model)
        names = {name.split("base_model.model.")[1].rsplit(".", 2)[0] for name in method.tensors(model)}
        assert names == set(expected)


def test_detaching_leaves_the_base() -> None:
    model = attached(LoReFT())
    detach(model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base("llama").named_modules()]
    assert torch.equal(logits(model), logits(base("llama")))


def test_a_copy_trains_alone_and_its_rows_stay_orthonormal() -> None:
    method = LoReFT()
    model = attached(method)
    before, twin = logits(model), copy.deepcopy(model)
    train(method, twin)
    assert torch.equal(logits(model), before)
    rows = _part(twin, 0, "prefix").R
    close(rows @ rows.T, torch.eye(4), atol=1e-6)


def test_it_cannot_be_merged_and_says_why() -> None:
    with pytest.raises(NotMergeable, match="hidden states"):
        LoReFT().merge(attached(LoReFT()))


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"r": 0}, "r"), ({"r": True}, "r"), ({"positions": "f"}, "positions"), ({"layers": ()}, "layers"),
        ({"layers": (0, 0)}, "layers"), ({"layers": (-1,)}, "layers"), ({"layers": "some"}, "layers"),
        ({"variant": "direft"}, "variant"), ({"dropout": 1.0}, "dropout"), ({"act_fn": "swish"}, "act_fn"),
        ({"act_fn": "tanh", "variant": "consreft"}, "act_fn"), ({"share_weights": 1}, "share_weights"),
        ({"share_weights": True, "positions": "f3"}, "share_weights"),
        ({"share_weights": True, "positions": "all"}, "share_weights"),
    ],
)  # fmt: skip
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        LoReFT(**fields)
    assert caught.value.where == f"method.{where}"
    assert caught.value.remedy


def test_a_model_that_lacks_the_place_is_refused_untouched() -> None:
    model = base("llama")
    for method, where in ((LoReFT(layers=(0, 2)), "method.layers"), (LoReFT(r=65), "method.r")):
        with pytest.raises(RecipeError) as caught:
            method.attach(model)
        assert caught.value.where == where
    assert not sites(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(RecipeError, match="positions: all"):
        LoReFT().attach(model.model)
    assert not sites(model)


def test_a_list_of_layers_may_come_from_yaml() -> None:
    assert LoReFT(layers=[1, 0]) == LoReFT(layers=(1, 0))  # type: ignore[arg-type]


def test_the_rig_is_large_enough_to_mean_it() -> None:
    assert TOKENS.shape[1] >= 8
    assert VOCABULARY >= 256
