"""Spectrum: ratios against a numpy twin of the authors' rules, the choice within types, the cache, Axolotl's lines."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.methods.spectrum import Spectrum
from luthier.models import signal
from luthier.models.signal import chosen, noise_edge, scan, signal_ratio, type_of
from methods.rig import base


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def twin(weight: np.ndarray) -> float:
    """The authors' rules in numpy and float64, written from their description."""
    values = np.sort(np.linalg.svd(weight.astype(np.float64), compute_uv=False))[::-1]
    quartiles = np.quantile(values, [0.25, 0.75])
    sigma = (quartiles[1] - quartiles[0]) / 1.349
    beta = min(weight.shape) / max(weight.shape)
    edge = sigma * np.sqrt((1 + np.sqrt(beta)) ** 2)
    signal_, noise = values[values > edge].sum(), values[values <= edge].sum()
    if not (values <= edge).any():
        noise = 1.0
    return float(signal_ / noise / values[0])


def matrices() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda *size: torch.randn(*size, generator=generator)
    noise = [draw(40, 24), draw(24, 40), draw(30, 30)]
    return [*noise, noise[0] + 5 * draw(40, 2) @ draw(2, 24), draw(64, 6) @ draw(6, 48) + 0.05 * draw(64, 48)]


@pytest.mark.parametrize("place", range(5))
def test_the_ratio_is_the_numpy_twins(place: int) -> None:
    weight = matrices()[place]
    expected = twin(weight.numpy())
    assert signal_ratio(weight) == pytest.approx(expected, rel=1e-4)
    assert signal_ratio(weight.T) == pytest.approx(expected, rel=1e-4)


def test_golden_ratios() -> None:
    """Kept as numbers too, so that the twin cannot drift along."""
    found = [signal_ratio(torch.diag(torch.tensor(values))) for values in (
        [8.0, 4.0, 2.0, 1.0], [10.0, 1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0]
    )]  # fmt: skip
    # quartiles 1.75 and 5.0: edge 2 * 3.25 / 1.349 = 4.818; above 8, below 7
    # quartiles 1 and 1: the edge is 0, nothing lies below: the divisor is 1
    assert found == pytest.approx([8 / 7 / 8, 14 / 1 / 10, 9 / 1 / 3])
    edge = noise_edge(torch.tensor([8.0, 4.0, 2.0, 1.0]), 4, 16)
    assert float(edge) == pytest.approx(3.25 / 1.349 * 1.5)


def test_matrices_without_a_ratio_are_never_chosen() -> None:
    broken = torch.eye(4)
    broken[0, 0] = math.nan
    assert math.isnan(signal_ratio(broken))
    assert math.isnan(signal_ratio(torch.zeros(4, 4)))
    rank_one = torch.zeros(4, 4)
    rank_one[0, 0] = 2.0
    assert signal_ratio(rank_one) == math.inf  # all below the edge is exactly zero
    ratios = {"a.0.q": math.nan, "a.1.q": 0.1, "a.2.q": math.inf, "a.3.q": 0.3}
    assert chosen(ratios, 50, highest=True) == ["a.2.q", "a.3.q"]
    assert chosen(ratios, 50, highest=False) == ["a.1.q", "a.3.q"]
    assert chosen(ratios, 100, highest=False) == ["a.1.q", "a.3.q", "a.2.q"]
    assert chosen({"a.0.q": math.nan}, 50, highest=True) == []


def test_the_choice_is_made_within_each_type() -> None:
    values = {"q": [3, 1, 2, 9, 5], "mlp.up": [30, 50, 50, 10, 20]}
    ratios = {f"m.layers.{i}.{kind}": value for kind, row in values.items() for i, value in enumerate(row)}
    assert chosen(ratios, 50, highest=True) == [
        "m.layers.3.q", "m.layers.4.q", "m.layers.1.mlp.up", "m.layers.2.mlp.up",
    ]  # fmt: skip
    assert chosen(ratios, 1, highest=False) == ["m.layers.1.q", "m.layers.3.mlp.up"]  # at least one
    assert type_of("model.layers.3.mlp.experts.7.up_proj") == "mlp.experts.7.up_proj"
    assert type_of("model.norm") == "model.norm"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "stories"])
def test_half_of_each_type_trains_with_embeddings_and_head(family: str) -> None:
    model = base(family)
    Spectrum().attach(model)
    found = {name for name, p in model.named_parameters() if p.requires_grad}
    weights: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if any(part.isdigit() for part in name.split(".")) and getattr(module, "weight", torch.ones(1)).ndim == 2:
            weights.setdefault(type_of(name), []).append(name)
    for names in weights.values():
        ratios = {name: twin(model.get_submodule(name).weight.detach().numpy()) for name in names}
        expected = sorted(ratios, key=lambda name: -ratios[name])[: len(names) // 2]
        assert {name for name in names if f"{name}.weight" in found} == set(expected)
        for name in names:
            if model.get_submodule(name)._parameters.get("bias") is not None:
                assert (f"{name}.bias" in found) == (name in expected)
    assert model.get_input_embeddings().weight.requires_grad
    assert model.get_output_embeddings().weight.requires_grad
    assert not [name for name in found if "norm" in name or "ln_" in name]


def test_low_is_the_other_half_and_embeddings_may_rest() -> None:
    high, low = base("llama"), base("llama")
    Spectrum(embeddings_and_head=False).attach(high)
    Spectrum(embeddings_and_head=False, order="low").attach(low)
    one, other = ({name for name, p in model.named_parameters() if p.requires_grad} for model in (high, low))
    assert len(one) == len(other) == 7
    assert not one & other


def test_lines_of_axolotl_skip_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal_ratio", lambda weight: pytest.fail("scanned"))
    lines = (
        "^lm_head.weight$",
        "^model.embed_tokens.weight$",
        "model.layers.1.mlp.down_proj",
        "model.layers.0.self_attn",
    )
    method, model = Spectrum(unfrozen_parameters=lines), base("qwen2")
    method.check(model)
    method.attach(model)
    found = {name for name, p in model.named_parameters() if p.requires_grad}
    attention = {n for n, _ in model.named_parameters() if n.startswith("model.layers.0.self_attn.")}
    assert found == attention | {
        "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight",
    }  # fmt: skip
    with pytest.raises(RecipeError, match="no parameter"):
        Spectrum(unfrozen_parameters=("model.layers.7",)).check(model)


def test_a_scan_is_kept_for_the_very_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {f"layers.{i}.q": w for i, w in enumerate(matrices())}
    first = scan(weights)
    (file,) = signal.cache_directory().iterdir()
    monkeypatch.setattr(signal, "signal_ratio", lambda weight: pytest.fail("scanned again"))
    assert scan(weights) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parents[2]))
    changed = {**weights, "layers.0.q": weights["layers.0.q"] + 1e-3}
    assert scan(changed) != first
    assert len(list(signal.cache_directory().iterdir())) == 2
    file.write_text("{")
    with pytest.warns(UserWarning, match="not a scan"):
        assert scan(weights) == first
    assert scan(weights) == first


def test_a_cache_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not kept"):
        scan({"layers.0.q": torch.eye(3)})


def test_weights_without_values_are_counted() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(4))})
    ratios = scan({name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    assert len(chosen(ratios, 50, highest=True)) == 2


def test_what_makes_no_sense_is_refused() -> None:
    for bad in ({"top_percent": 0}, {"top_percent": 101}, {"order": "up"}, {"unfrozen_parameters": ("[",)}):
        with pytest.raises(RecipeError, match="method"):
            Spectrum(**bad)
