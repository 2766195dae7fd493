"""Every file of the real inputs that holds rows to train on is read whole, and the ledger balances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data.reading import read_file
from luthier.contracts.errors import DataError

FILES = {
    "axolotl/alpaca_alpaca.json": ("Chat", 2),
    "axolotl/conversation.json": ("Chat", 1),
    "fastchat/dummy_conversation.json": ("Chat", 500),
    "gsm8k/test.jsonl": ("Completion", 1319),
    "gsm8k/train_first.jsonl": ("Completion", 5387),
    "llamafactory/alpaca_en_demo.json": ("Chat", 999),
    "llamafactory/alpaca_zh_demo.json": ("Chat", 1000),
    "llamafactory/c4_demo.jsonl": ("Text", 300),
    "llamafactory/glaive_toolcall_en_demo.json": ("Chat", 300),
    "llamafactory/identity.json": ("Chat", 91),
    "llamafactory/v1_sft_demo.jsonl": ("Chat", 500),
    "llamafactory/wiki_demo.txt": ("Text", 30),
    "tinyshakespeare/input.txt": ("Text", 7222),
    "torchtune/alpaca_tiny.json": ("Chat", 100),
    "torchtune/chat_tiny.json": ("Chat", 1),
    "torchtune/instruct_tiny.json": ("Completion", 2),
    "llamafactory/dpo_en_demo.json": ("Pair", 300),
    "llamafactory/v1_dpo_demo.jsonl": ("Pair", 10),
    "llamafactory/kto_en_demo.json": ("Judged", 300),
    "torchtune/hh_rlhf_tiny.json": ("Pair", 1),
    "torchtune/stack_exchange_paired_tiny.json": ("Pair", 25),
}
NOT_OURS = ["fastchat/mt_bench_question.jsonl", "self_instruct/seed_tasks.jsonl"]


@pytest.mark.parametrize("name", FILES)
def test_it_is_read_whole(shared_data: Callable[[str], Path], name: str) -> None:
    prepared = read_file(shared_data(f"raw/{name}"))
    found, ledger = prepared.train_records, prepared.ledger
    ledger.assert_balanced()
    assert ({type(record).__name__ for record in found}, len(found)) == ({FILES[name][0]}, FILES[name][1])
    assert ledger.total("read") == ledger.total("kept") == len(found)


def test_tool_calls_of_a_real_file_are_objects(shared_data: Callable[[str], Path]) -> None:
    found = read_file(shared_data("raw/llamafactory/glaive_toolcall_en_demo.json")).train_records
    calls = [call for chat in found for message in chat.messages for call in message.get("tool_calls", ())]
    assert len(calls) == 211 and all(isinstance(call["function"]["arguments"], dict) for call in calls)
    assert any(chat.tools for chat in found)


def test_an_empty_answer_is_named(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("raw/axolotl/conversation.missingturns.json")
    with pytest.raises(DataError, match=r"empty content — .*json:1:conversations\[1\]\.value"):
        read_file(path)


@pytest.mark.parametrize("name", NOT_OURS)
def test_rows_of_another_kind_are_refused_by_their_columns(shared_data: Callable[[str], Path], name: str) -> None:
    with pytest.raises(DataError, match="no known format has these columns"):
        read_file(shared_data(f"raw/{name}"))
