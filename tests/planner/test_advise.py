"""Every leaf of the decision trees is reached by the facts that name it; facts are read strictly."""

from __future__ import annotations

import pytest

from luthier.contracts.errors import UsageError
from luthier.planner.advise import TREES, advise, facts_of

LEAVES = {
    ("method", "tune=no"): "prompting or retrieval",
    ("method", "tasks=12 gpu_gb=24"): "lora, kept apart",
    ("method", "zero_latency=yes gpu_gb=24"): "lora, merged",
    ("method", "rows=200_000 gpu_gb=80 gpus=8"): "full",
    ("method", "rows=500 gpu_gb=80 domain_gap=yes"): "full",
    ("method", "rows=500 gpu_gb=24 domain_gap=yes"): "lora, high rank",
    ("method", "rows=5000"): "qlora",
    ("method", "rows=5000 gpu_gb=12"): "qlora",
    ("method", "rows=5000 gpu_gb=24"): "lora or qlora",
    ("method", "rows=5000 gpu_gb=48"): "lora or qlora",
    ("method", "rows=5000 gpu_gb=80"): "lora or dora",
    ("objective", "rows=10"): "sft",
    ("objective", "pairs=yes"): "dpo",
    ("objective", "pairs=yes noisy=yes"): "ipo",
    ("objective", "pairs=yes simplest=yes"): "simpo or orpo",
    ("objective", "thumbs=yes"): "kto",
    ("objective", "strongest=yes pairs=yes"): "ppo",
    ("objective", "reasoning=yes"): "grpo",
    ("objective", "online=yes"): "online dpo",
    ("start", "dialogue=yes rows=2000"): "chat model",
    ("start", "rows=200000 dialogue=yes"): "base model",
}


def facts(words: str) -> dict[str, str]:
    return dict(word.split("=") for word in words.split())


@pytest.mark.parametrize(("tree", "words"), LEAVES, ids=[" ".join(key) for key in LEAVES])
def test_leaf(tree: str, words: str) -> None:
    assert advise(facts_of(facts(words)))[tree][0].name == LEAVES[tree, words]


def test_no_leaf_is_out_of_reach() -> None:
    named = {(tree, leaf.name) for tree, rules in TREES.items() for _, leaf in rules}
    assert {(tree, name) for (tree, _), name in LEAVES.items()} == named


@pytest.mark.parametrize("words", ["row=5", "rows=many", "rows=-1", "pairs=perhaps", "gpu_gb=inf"])
def test_facts_are_read_strictly(words: str) -> None:
    with pytest.raises(UsageError):
        facts_of(facts(words))
