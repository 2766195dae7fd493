"""Real bases and real rows: the loss on fixed held-out rows falls, merge agrees, PEFT and we read each other's files.

Three views of one pre-trained Llama (ChatML, Llama-3 tokens, no chat tokens at all) times four kinds of rows: by day
each view and each kind of rows, all pairs of them in the nightly run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.models.head import relative_difference
from luthier.opened import open_target

ROWS = {
    "alpaca": ("raw/llamafactory/alpaca_en_demo.json", 60),
    "sharegpt": ("raw/fastchat/dummy_conversation.json", 90),
    "gsm8k": ("raw/gsm8k/train_first.jsonl", 40),
}
BASES = {
    "chatml": ("models/stories260K-chatml", []),
    "llama3": ("models/stories260K-llama3", []),
    "hf": ("models/stories260K-hf", ['model.add_tokens=["<|im_start|>", "<|im_end|>"]']),
}
BY_DAY = {("chatml", "alpaca"), ("chatml", "sharegpt"), ("hf", "gsm8k"), ("llama3", "tools")}


def _tool_rows(path: Path, cities: tuple[str, ...]) -> Path:
    tool = {"name": "warmth", "description": "of a city", "parameters": {"type": "object", "properties": {}}}
    rows = []
    for number in range(24):
        city = cities[number % len(cities)]
        call = {"name": "warmth", "arguments": json.dumps({"city": city})}
        messages = [
            {"role": "user", "content": f"How warm is {city}?"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": "c1", "name": "warmth", "content": str(number)},
            {"role": "assistant", "content": f"{number} degrees in {city}."},
        ]
        rows.append({"messages": messages, "tools": [{"type": "function", "function": tool}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _head(source: Path, skip: int, count: int, out: Path) -> Path:
    """`count` rows of a file from row `skip` on, as JSONL."""
    text = source.read_text()
    rows = json.loads(text) if source.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[skip : skip + count]))
    return out


def _files(kind: str, shared_data: Callable[[str], Path], folder: Path) -> tuple[Path, Path]:
    """Training rows and other rows held out."""
    if kind == "tools":
        train = _tool_rows(folder / "train.jsonl", ("Oslo", "Rome", "Cairo"))
        return train, _tool_rows(folder / "held.jsonl", ("Lima", "Quito"))
    name, count = ROWS[kind]
    source = shared_data(name)
    return _head(source, 20, count, folder / "train.jsonl"), _head(source, 0, 20, folder / "held.jsonl")


def _recipe(path: Path, base: Path, train: Path, template: str) -> Path:
    path.write_text(
        f"model: {{path: {base}, chat_template: {template}}}\n"
        f"data: {{train: {train}, max_tokens: 512}}\n"
        "method: {name: lora, r: 8}\n"
        "train: {max_steps: 8, tokens_per_step: 2048, learning_rate: 1.0e-2, save_every: 8, schedule: constant}\n"
        f"output_dir: {path.parent / 'run'}\n"
    )
    return path


@pytest.mark.parametrize(
    ("view", "kind"),
    [
        pytest.param(view, kind, marks=[] if (view, kind) in BY_DAY else [pytest.mark.nightly])
        for view in BASES
        for kind in (*ROWS, "tools")
    ],
)
def test_tuned_scored_merged_and_read_by_peft(
    luthier: Callable[..., Any], shared_data: Callable[[str], Path], tmp_path: Path, view: str, kind: str
) -> None:  # fmt: skip
    name, more = BASES[view]
    base = shared_data(name)
    train, held = _files(kind, shared_data, tmp_path)
    template = "llama3" if view == "llama3" else "chatml"
    recipe = _recipe(tmp_path / "recipe.yaml", base, train, template)
    losses = []
    for steps in (1, 8):
        trained = luthier("train", recipe, *more, f"train.max_steps={steps}", "--fresh", "--progress", "off", "--json")
        assert trained.code == 0, trained.err
        scored = luthier("evaluate", tmp_path / "run", "--on", held, "--no-exact-match", "--max-tokens", 512, "--json")
        assert scored.code == 0, scored.err
        losses.append(scored.json["loss"])
    assert losses[1] < losses[0]
    merged = luthier("merge", tmp_path / "run", "--out", tmp_path / "merged", "--json")
    assert merged.code == 0 and merged.json["max_logit_difference"] < 1e-4 and merged.json["greedy_equal"]
    said = [
        luthier("generate", tmp_path / target, "--prompt", "How warm is Oslo?", "--max-new-tokens", 12, "--json").json
        for target in ("run", "merged")
    ]
    assert said[0] == said[1] and said[0]["tokens"] > 0
    _peft_agrees(tmp_path / "run" / "adapter", base)


def _peft_agrees(adapter: Path, base: Path) -> None:
    """PEFT's model with our files and ours with the files PEFT writes again: the same logits."""
    peft = pytest.importorskip("peft")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(model, adapter).eval()
    opened = open_target(adapter)
    ids = torch.randint(3, len(tokenizer), (1, 40), generator=torch.Generator().manual_seed(1))
    ids[0, -4:] = torch.arange(len(tokenizer) - 4, len(tokenizer))  # the newest tokens too
    with torch.no_grad():
        ours = opened.model(input_ids=ids).logits
        assert relative_difference(ours, theirs(input_ids=ids).logits) < 1e-5
        theirs.save_pretrained(adapter.parent / "again", save_embedding_layers=False)
        tokenizer.save_pretrained(adapter.parent / "again")
        config = json.loads((adapter.parent / "again" / "adapter_config.json").read_text())
        added = json.loads((adapter / "luthier.json").read_text())["added_tokens"]
        if added:  # PEFT's files do not say which tokens were added; ours beside them do
            return
        assert config["base_model_name_or_path"] == str(base)
        again = open_target(adapter.parent / "again").model(input_ids=ids).logits
        assert relative_difference(again, ours) < 1e-5
