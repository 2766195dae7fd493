"""ReFT beyond the laws: variants, twins, orthonormal rows, dropout, sizes, files, refusals. Where it edits is tested in
test_reft_places.py, against pyreft in test_reft_pyreft.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.methods.loreft import LoReFT
from luthier.models import reft
from luthier.models.blocks import blocks
from luthier.models.reft import Intervention, ReFT
from luthier.models.sites import AdaptedModule, detach, sites
from methods.reft_rig import ALL, VARIANTS, attached, named, part_of, same_numbers
from methods.rig import base, logits, loss, train


@pytest.mark.parametrize("act", [None, torch.tanh])
def test_the_short_formula_is_the_plain_one(act: Any) -> None:
    torch.manual_seed(1)
    given = [torch.randn(*shape, requires_grad=True) for shape in ((7, 12), (3, 12), (3, 12), (3,))]
    slope = torch.randn(7, 12)
    made = []
    for formula in (reft.loreft, reft.loreft_plain):
        edit = formula(*given, act)
        made.append((edit, *torch.autograd.grad((edit * slope).sum(), given)))
    same_numbers(made[0], made[1])


def test_some_rows_are_edited_as_all_rows_chosen_by_a_mask() -> None:
    torch.manual_seed(1)
    part = Intervention("loreft", 3, 12, torch.device("cpu"))
    y, slope, rows = torch.randn(9, 12, requires_grad=True), torch.randn(9, 12), torch.tensor([7, 0, 4])
    made = []
    for how in (reft.edit_rows, reft.edit_rows_plain):
        out = how(y, rows, part)
        made.append((out, *torch.autograd.grad((out * slope).sum(), [y, *part.parameters()])))
    same_numbers(made[0], made[1])
    assert torch.equal(made[0][0][[1, 2, 3, 5, 6, 8]], y[[1, 2, 3, 5, 6, 8]])


def test_the_nearest_orthonormal_rows_are_those_of_singular_values() -> None:
    torch.manual_seed(1)
    given = torch.randn(5, 4, 16)
    found = reft.orthonormal(given)
    same_numbers(found, reft.orthonormal_plain(given), atol=1e-6)
    same_numbers(found @ found.mT, torch.eye(4).expand(5, 4, 4), atol=1e-6)
    same_numbers(torch.stack([reft.orthonormal(one) for one in given]), found, atol=1e-6)


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
    assert torch.equal(saved["base_model.model.model.layers.1.suffix.R"], part_of(model, 1, "suffix").R)
    assert {name.rpartition(".")[2] for name in saved} == {"R", "W", "b"}


@pytest.mark.parametrize("method", ALL, ids=named)
def test_every_variant_saves_and_loads_exactly(method: LoReFT, tmp_path) -> None:
    model, fresh = attached(method), base("llama")
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    assert load_adapter(tmp_path / "a", fresh) == method
    assert torch.equal(logits(fresh), logits(model))
    (tmp_path / "a" / "luthier.json").unlink()  # the config alone says what it is
    bare = base("llama")
    assert type(load_adapter(tmp_path / "a", bare)) is type(method)
    assert torch.equal(logits(bare), logits(model))


@pytest.mark.parametrize("method", ALL, ids=named)
def test_every_variant_learns(method: LoReFT) -> None:
    model = attached(method, steps=0)
    before = loss(model).item()
    train(method, model, 6)
    assert loss(model).item() < before


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
    same_numbers(part(y), y + reft.loreft_plain(y, part.R, part.W, part.b))


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
    rows = part_of(twin, 0, "prefix").R
    same_numbers(rows @ rows.T, torch.eye(4), atol=1e-6)


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
