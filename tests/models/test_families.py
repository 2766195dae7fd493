"""Families: each gets the path recorded in families.json, and what it computes there is what a row alone gives.

The table was written by tests/models/sweep.py. A family that moves to another path, a new family, or one that
vanished is a change to look at: run the sweep again and read the difference. Every push measures a sample, the
nightly run all. The law at the end is asked with LoRA attached and of pairs: prompts with two answers, one row and
trees, log-probabilities and gradients of the sites against every path given to the adapted model alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from luthier.methods.lora import LoRA
from luthier.models.probe import open_trunk, probe_batch
from models import sweep
from tiny_families import logprobs_alone

RECORDED: dict[str, list[str]] = json.loads(Path(__file__).with_name("families.json").read_text())
PUSH = (
    "llama", "gpt2", "gemma2", "qwen3_moe", "xlm-roberta", "llama4", "cohere_compass_text", "gptj", "bart", "mamba2",
    "falcon_h1", "xlnet", "gemma4_text",
)  # fmt: skip
PACKED = (
    "llama", "qwen2", "qwen3_moe", "mistral", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "deepseek_v3", "phi3",
    "olmo2", "cohere2", "granite", "glm4", "stablelm", "gpt2", "roberta",
)  # fmt: skip
HYBRIDS = (
    "qwen3_5_text", "qwen3_next", "lfm2", "lfm2_moe", "falcon_h1", "granitemoehybrid", "nemotron_h", "jamba", "mamba",
    "mamba2", "zamba2", "bamba", "recurrent_gemma", "qwen3_5_moe_text", "olmo_hybrid",
)  # fmt: skip
UNSHARED = {"zamba2": dict(target_modules=["in_proj", "out_proj"])}  # its attention layers share one set of weights
PAIRS = ((-1, 0, 0, -1, 3, 3, -1, -1), (12, 9, 14, 7, 9, 5, 11, 11))  # two pairs and two rows of one length


def nightly_but(names: tuple[str, ...], chosen: tuple[str, ...]) -> list[object]:
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.nightly) for name in names]


def test_the_table_has_every_family_and_most_of_them_pack() -> None:
    assert sorted(RECORDED) == sweep.families()
    paths = Counter(path for path, _ in RECORDED.values())
    assert paths["forest"] + paths["forest + last layer"] >= 113
    assert all(reason for path, reason in RECORDED.values() if path != "forest + last layer")


@pytest.mark.parametrize("name", nightly_but(tuple(RECORDED), PUSH))
def test_the_path_is_the_recorded_one(name: str) -> None:
    path, reason = sweep.path_in_child(name)
    recorded, why = RECORDED[name]
    assert (path, in_words(reason)) == (recorded, in_words(why))


def in_words(reason: str) -> str:
    return re.sub(r"[-+.\d]+(e[-+]?\d+)?", "#", reason)  # the last digits differ from machine to machine


@pytest.mark.parametrize("name", nightly_but(PACKED + HYBRIDS, (*PACKED, "qwen3_5_text", "lfm2", "mamba", "zamba2")))
def test_pairs_with_lora_are_what_every_path_alone_gives(name: str) -> None:
    model = sweep.build(name)
    trunk, method = open_trunk(model), LoRA(r=4, **UNSHARED.get(name, {}))
    assert trunk.path == ("unpacked" if name in HYBRIDS else "forest")
    method.attach(model)
    sites = {n: p for n, p in model.named_parameters() if p.requires_grad}
    made = torch.Generator().manual_seed(5)
    for parameter in sites.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=made)
    batch = probe_batch(120, *PAIRS)
    together, alone = trunk.logprobs(batch), logprobs_alone(model, batch)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)
    found, expected = (
        torch.autograd.grad((value * batch.weights_N).sum(), list(sites.values()), allow_unused=True)
        for value in (together, alone)
    )
    largest = max(g.abs().max() for g in expected if g is not None)
    for site, mine, right in zip(sites, found, expected, strict=True):
        assert (mine is None) == (right is None), site
        if mine is not None and right is not None:
            assert (mine - right).abs().max() <= 2e-4 * (right.abs().max() + 1e-2 * largest), site
    idle = {site for site, g in zip(sites, expected, strict=True) if g is None or not g.any()}
    assert not {site for site in idle if "expert" not in site}, "sites that never train"
