"""A reward model as a person makes and uses one: pairs in, training, ranking held-out pairs, merge, transformers."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from luthier import run as hall
from luthier.contracts.record import Chat, Source
from luthier.evaluation.reward import RewardScorer

Luthier = Callable[..., Any]
STEPS = 24


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """The better answer is the one that says please; all other words are drawn."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choice("abcdefghij") for _ in range(rng.randrange(3, 8)))

    def turn(role: str, *words: str) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(words)}]

    return [
        {
            "prompt": turn("user", word()),
            "chosen": turn("assistant", word(), "please", word()),
            "rejected": turn("assistant", word(), "no", word()),
        }
        for _ in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Rows, held-out rows and a recipe."""
    where = tmp_path_factory.mktemp("reward")
    write(where / "train.jsonl", pairs(120, 1))
    write(where / "held.jsonl", pairs(50, 2))
    (where / "recipe.yaml").write_text(
        f"model: {base}\n"
        f"data: {{train: {where / 'train.jsonl'}, max_tokens: 128}}\n"
        "method: {name: lora, r: 4}\n"
        "objective: reward\n"
        f"train: {{max_steps: {STEPS}, rows_per_step: 16, save_every: 8, learning_rate: 1.0e-2}}\n"
        f"output_dir: {where / 'run'}\n"
    )
    return where


@pytest.fixture(scope="module")
def trained(place: Path, luthier: Luthier) -> Path:
    said = luthier("train", place / "recipe.yaml")
    assert said.code == 0, said.err
    assert "the score head is new" in said.err and "evaluate" in said.out
    return place / "run"


def held(place: Path) -> list[Chat]:
    rows = [json.loads(line) for line in (place / "held.jsonl").read_text().splitlines()]
    return [
        Chat(row["prompt"] + row[side], Source("held", i))
        for i, row in enumerate(rows)
        for side in ("chosen", "rejected")
    ]


def test_it_ranks_pairs_it_has_not_seen(place: Path, trained: Path, luthier: Luthier, tmp_path: Path) -> None:
    said = luthier("evaluate", trained, "--on", place / "held.jsonl")
    assert said.code == 0, said.err
    assert re.search(r"ranked right (0\.9\d+|1\.000) of 50 pairs", said.out), said.out
    found = luthier(
        "evaluate", trained / "adapter", "--on", place / "held.jsonl", "--json", "--answers", tmp_path / "a"
    )
    assert found.json["accuracy"] > 0.9 and found.json["pairs"] == 50 and found.json["loss"] < 0.3
    answers = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert len(answers) == 50 and sum(answer["right"] for answer in answers) / 50 == found.json["accuracy"]
    assert answers[0]["source"].endswith("held.jsonl:1")
    assert json.loads((trained / "report.json").read_text())["reads"] == "scores"


def test_the_scorer_gives_what_the_card_s_own_lines_give(place: Path, trained: Path) -> None:
    """The code of the card, run as it stands: transformers and PEFT score one row as we score it among many."""
    opened = hall.load(trained)
    records = held(place)[:6]
    scores = RewardScorer(opened.model, opened.encoder, microbatch_tokens=100)(records)
    code = re.search(r"```python\n(.*?)```", (trained / "README.md").read_text(), re.DOTALL)
    assert code is not None
    text = code[1].replace("DIRECTORY", str(trained / "adapter"))
    for record, score in zip(records, scores, strict=True):
        names: dict[str, Any] = {"messages": list(record.messages)}
        exec(text, names)
        assert float(names["score"].detach()) == pytest.approx(score, abs=1e-4)
    long = Chat([{"role": "user", "content": "x" * 4000}, {"role": "assistant", "content": "y"}], Source("long", 1))
    assert RewardScorer(opened.model, opened.encoder)([long, records[0]])[0] is None


def test_merged_it_scores_the_same(place: Path, trained: Path, luthier: Luthier, tmp_path: Path) -> None:
    said = luthier("merge", trained, "--out", tmp_path / "merged")
    assert said.code == 0 and "largest difference of scores" in said.out and "greedy" not in said.out
    before = luthier("evaluate", trained, "--on", place / "held.jsonl", "--json").json
    after = luthier("evaluate", tmp_path / "merged", "--on", place / "held.jsonl", "--json").json
    assert after["accuracy"] == before["accuracy"]
    assert after["margin"] == pytest.approx(before["margin"], rel=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    opened = hall.load(trained)
    records = held(place)[:4]
    texts = [tokenizer.apply_chat_template(list(r.messages), tokenize=False) for r in records]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    theirs = model(**inputs).logits[:, 0].tolist()
    assert theirs == pytest.approx(RewardScorer(opened.model, opened.encoder)(records), abs=1e-4)


def test_resumed_it_is_the_unbroken_run(place: Path, trained: Path, luthier: Luthier, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for gone in ("checkpoint-16", f"checkpoint-{STEPS}", "adapter"):
        shutil.rmtree(copy / gone)
    said = luthier("train", place / "recipe.yaml", f"output_dir={copy}", "--resume", "auto")
    assert said.code == 0, said.err
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (trained, copy))
    assert one.keys() == two.keys() and "base_model.model.score.weight" in one
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_full_fine_tuning_gives_a_model_that_transformers_scores_with(
    place: Path, luthier: Luthier, tmp_path: Path
) -> None:
    run = tmp_path / "full"
    how = ("method=full", "train.learning_rate=2e-3", "data.eval=0.2", "objective.center_rewards_coefficient=0.01")
    said = luthier("train", place / "recipe.yaml", f"output_dir={run}", *how)
    assert said.code == 0, said.err
    scores = luthier("evaluate", run, "--on", place / "held.jsonl", "--json").json
    assert scores["accuracy"] > 0.9
    assert abs(scores["reward_chosen"] + scores["reward_rejected"]) < scores["margin"]
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    opened = hall.load(run)
    record = held(place)[0]
    ids = opened.tokenizer.apply_chat_template(list(record.messages), return_tensors="pt", return_dict=True)
    (score,) = RewardScorer(opened.model, opened.encoder)([record])
    assert float(model(**ids).logits[0, 0].detach()) == pytest.approx(score, abs=1e-5)
    assert "A reward model from" in (run / "README.md").read_text()
    again = luthier("train", place / "recipe.yaml", f"model={run / 'model'}", f"output_dir={tmp_path / 'more'}",
                    "train.max_steps=1")  # fmt: skip
    assert again.code == 0 and "score head is new" not in again.err


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_it_writes_nothing(verb: str, trained: Path, luthier: Luthier) -> None:
    words = ["generate", trained, "--prompt", "hello"] if verb == "generate" else ["chat", trained]
    said = luthier(*words)
    assert said.code == 2 and "a reward model: it scores answers and writes none" in said.err


BAD = {
    "conversations": ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], [],
                      "does not train on conversations"),
    "the same twice": ([{"prompt": "a", "chosen": "b", "rejected": "b"}], [], "chosen and rejected are the same"),
    "a margin in words": ([{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}], [], "not a margin"),
    "a negative centre": ([{"prompt": "a", "chosen": "b", "rejected": "c"}],
                          ["objective.center_rewards_coefficient=-1"], "center_rewards_coefficient"),
    "another objective's field": ([{"prompt": "a", "chosen": "b", "rejected": "c"}], ["objective.beta=0.1"], "beta"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_says_where(case: str, place: Path, luthier: Luthier, tmp_path: Path) -> None:
    rows, overrides, words = BAD[case]
    path = write(tmp_path / "bad.jsonl", rows)
    said = luthier("train", place / "recipe.yaml", f"data.train={path}", f"output_dir={tmp_path / 'run'}", *overrides)
    assert said.code in (2, 3) and words in said.err, said.err
    assert "Traceback" not in said.err


def test_what_a_reward_model_is_not_for_is_refused(
    place: Path, trained: Path, base: Path, luthier: Luthier, rows: Path, tmp_path: Path
) -> None:
    said = luthier("evaluate", trained, "--on", rows)
    assert said.code != 0 and "pairs" in said.err
    said = luthier("evaluate", trained, "--on", place / "held.jsonl", "--exact-match")
    assert said.code == 2 and "writes none" in said.err
    assert luthier("merge", trained, "--out", tmp_path / "merged").code == 0
    said = luthier("train", place / "recipe.yaml", f"model={tmp_path / 'merged'}", "objective=sft",
                   f"data.train={rows}", f"output_dir={tmp_path / 'run'}")  # fmt: skip
    assert said.code != 0 and "it has a score head and no language head" in said.err
    three = tmp_path / "three"
    shutil.copytree(base, three)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(three)
    said = luthier("train", place / "recipe.yaml", f"model={three}", f"output_dir={tmp_path / 'run'}")
    assert said.code != 0 and "a reward model gives one score" in said.err
