"""The chat templates that come along by name print every part of a conversation, and what trains is the answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Source
from luthier.data.encode import Encoder
from luthier.data.template import open_template
from tiny import tiny_tokenizer

TOOLS = [{"type": "function", "function": {"name": "warmth", "description": "of a city", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "warmth", "arguments": {"city": "Oslo"}}}
CALLED = '<tool_call>{"name": "warmth", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>'
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How warm is Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "name": "warmth"},
    {"role": "assistant", "content": "4 degrees."},
]
MASK = SimpleNamespace(
    roles=("assistant",), last_turn_only=False, thinking="as_template", train_generation_prompt=False
)
SECTION = SimpleNamespace(mask=MASK, max_tokens=2048, overlong="drop", injection="escape")


@pytest.mark.parametrize(
    ("name", "controls", "trained"),
    [
        ("chatml", [], [CALLED, "4 degrees.<|im_end|>"]),
        (
            "llama3",
            ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            ['{"name": "warmth", "parameters": {"city": "Oslo"}}<|eot_id|>', "4 degrees.<|eot_id|>"],
        ),
    ],
)  # fmt: skip
def test_tools_calls_and_results_are_printed_and_answers_train(
    name: str, controls: list[str], trained: list[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": controls}, replace_extra_special_tokens=False)
    stops = [tokenizer.convert_tokens_to_ids(controls[-1] if controls else "<|im_end|>")]
    encoder = Encoder(tokenizer, open_template(None, tokenizer, name), SECTION, stops)
    masked = encoder.masked(Chat(MESSAGES, Source("rows.jsonl", 1), TOOLS))
    text = masked.encoded.text
    assert [text[turn.start : turn.end] for turn in masked.turns] == trained
    assert all(part in text for part in ("Be brief.", "How warm is Oslo?", '"warmth"', "of a city", "\n4<|"))


def test_an_unknown_name_lists_those_that_come_along() -> None:
    with pytest.raises(DataError, match=r"no such chat template.*chatmll.*chatml, llama3"):
        open_template(None, tiny_tokenizer(), "chatmll")
