"""The text that must train, written down for 88 templates and nine conversations each, token for token (D2, D4).

The gold is verified against readings that share no code with the masks (gold_reading.py) before it is used. What is
not in it does not train: a mask is compared as a whole, with the offsets of the tokenizer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.families import STRINGS, tokenizer_for, trained
from data.gold_reading import CHATS as EVERY
from data.gold_reading import LONGER, by_format, by_markers, entries, places, rendered, tools_of
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Source
from luthier.data.mask import Masker
from luthier.data.overrides import overridden
from luthier.data.template import Template

ENTRIES = dict(entries())
CHATS = {name: messages for name, messages in EVERY.items() if name != "injection"}  # that one has no clean twin


@cache
def _masker(path: Path) -> Masker:
    template = overridden(Template(path.read_text(encoding="utf-8"), STRINGS, path.stem))
    return Masker(template, tokenizer_for(template))


@pytest.fixture
def masker(stem: str, shared_data: Callable[[str], Path]) -> Masker:
    path = shared_data("chat_templates") / f"{stem}.jinja"
    if not path.is_file():
        pytest.skip(f"no template {path.name} beside the checkout")
    return _masker(path)


def _twin(entry: Mapping[str, Any], shared_data: Callable[[str], Path]) -> str | None:
    path = shared_data("chat_templates") / f"{entry.get('twin')}.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def test_the_gold_covers_forty_families_and_every_kind_of_conversation() -> None:
    assert len(ENTRIES) >= 80
    proven = {name: sum(name in entry["trained"] for entry in ENTRIES.values()) for name in CHATS}
    assert all(count >= (35 if tools_of(name) else 80) for name, count in proven.items()), proven
    for stem, entry in ENTRIES.items():
        assert sorted([*entry["trained"], *entry.get("refused", ())]) == sorted(CHATS), stem
        for name, texts in entry["trained"].items():
            assert len(texts) == sum(message["role"] == "assistant" for message in CHATS[name]), (stem, name)
            assert all(text.endswith(tuple(entry["stop"])) for text in texts), (stem, name)


@pytest.mark.parametrize("stem", sorted(ENTRIES))
def test_the_gold_is_what_an_independent_reading_finds(
    stem: str, masker: Masker, shared_data: Callable[[str], Path]
) -> None:
    entry = ENTRIES[stem]
    twin = _twin(entry, shared_data)
    for name in CHATS:
        shown = rendered(masker.template.text, name)
        gold = entry["trained"].get(name)
        if gold is None:
            assert shown is None or name in entry.get("cannot", ()), (stem, name)
            continue
        assert shown is not None
        if "supplied" not in entry:
            assert by_format(shown, entry, name) == gold, (stem, name)
        if twin is not None:  # white space behind the stop, and Phi-3's eos behind the last turn, train there
            marked = [text.rstrip() for text in by_markers(twin, name) or [] if text != "<EOS>"]
            assert [text.removeprefix(entry.get("supplied", "")) for text in marked] == gold, (stem, name)


@pytest.mark.parametrize("stem", sorted(ENTRIES))
def test_what_trains_is_the_gold_token_for_token(stem: str, masker: Masker) -> None:
    entry = ENTRIES[stem]
    for name, messages in CHATS.items():
        row = Chat(messages, Source(name, 1), tools_of(name))
        if name in entry.get("refused", ()):
            with pytest.raises(DataError, match=stem) as caught:
                masker.mask(row)
            assert caught.value.remedy
            continue
        masked = masker.mask(row)
        text = masked.encoded.text
        tokens = masker.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert tokens["input_ids"] == masked.encoded.ids_T.tolist()
        wanted = np.zeros(len(tokens["input_ids"]), dtype=bool)
        starts, ends = np.array(tokens["offset_mapping"]).T
        for start, end in places(text, entry, name, spaces=masker.template.has_markers):
            wanted |= (starts >= start) & (ends <= end)
        assert np.array_equal(masked.weights_T > 0, wanted), (stem, name)


_DROPPED = "drops the content of message 1 (assistant)"
_AFTER_TOOL = "what the generation prompt supplies before message 6 is not found"  # the file loses the turn's header
NOT_SHOWN: dict[str, dict[str, str]] = {  # what templates with tools cannot show, seen in the files, and how we say so
    "words beside a call": {
        **dict.fromkeys((
            "llamacpp__NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "trl__llama3_1", "trl__llama3_2",
            "llamacpp__CohereForAI-c4ai-command-r7b-12-2024-tool_use", "axolotl__mistral_v2v3",
            "axolotl__mistral_v3_tekken", "llamacpp__mistralai-Mistral-Nemo-Instruct-2407",
            "llamacpp__Mistral-Small-3.2-24B-Instruct-2506", "trl__gptoss",
        ), _DROPPED),
        "llamacpp__deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "as a turn of their own behind its call",
        "axolotl__gemma4": "content of message 2 lies in the trained span of 1",  # the words follow the result
    },
    "two calls": {
        "trl__llama3_1": "single tool-calls at once", "trl__llama3_2": "single tool-calls at once",
        "trl__gptoss": "drops a tool call's argument", "llamacpp__GigaChat3.1-10B-A1.8B": "drops a tool call's name",
    },
    "rounds": {
        "trl__deepseekv3": _AFTER_TOOL, "llamacpp__deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": _AFTER_TOOL,
        "llamacpp__Bielik-11B-v3.0-Instruct": "before message 4 has <|im_end|>, which the row has not",
    },
    "chain": {
        **dict.fromkeys(
            ("trl__deepseekv3", "llamacpp__deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "llamacpp__Apertus-8B-Instruct"),
            _AFTER_TOOL.replace("6", "3"),
        ),
    },
    "nested": {"llamacpp__ByteDance-Seed-OSS": "marking the content changes the text"},  # printed by Python's repr
}  # fmt: skip


@pytest.mark.parametrize("stem", sorted(stem for stem, entry in ENTRIES.items() if "tools" in entry["trained"]))
def test_longer_conversations_with_tools_train_what_the_format_says(
    stem: str, masker: Masker, shared_data: Callable[[str], Path]
) -> None:
    entry = ENTRIES[stem]
    for name, messages in LONGER.items():
        row = Chat(messages, Source(name, 1), tools_of(name))
        if (reason := NOT_SHOWN[name].get(stem)) is not None:
            with pytest.raises(DataError) as caught:
                masker.mask(row)
            assert reason in caught.value.line(), (stem, name)
            continue
        found = trained(masker.mask(row))
        shown = rendered(masker.template.text, name)
        assert shown is not None, (stem, name)
        if "supplied" in entry:
            marked = by_markers(_twin(entry, shared_data) or "", name) or []
            gold = [text.removeprefix(entry["supplied"]) for text in marked]
        else:
            gold = by_format(shown, entry, name)
        assert [text.rstrip() for text in found] == gold, (stem, name)


@pytest.mark.parametrize("stem", sorted(ENTRIES))
def test_every_answer_ends_with_a_stop_token_and_the_text_begins_once(stem: str, masker: Masker) -> None:
    names = masker.vocabulary.names
    for name in ENTRIES[stem]["trained"]:
        masked = masker.mask(Chat(CHATS[name], Source(name, 1), tools_of(name)))
        ids = masked.encoded.ids_T
        for turn in masked.turns:
            inside = np.flatnonzero(masked.encoded.inside(turn.start, turn.end))
            shown = [int(i) for i in inside if text_of(masked, int(i)).strip()]
            assert int(ids[shown[-1]]) in masker.stop_ids and masked.weights_T[shown[-1]], (stem, name)
        bos = [i for i, index in enumerate(ids.tolist()) if names.get(index) == "<BOS>"]
        assert len(bos) == masked.encoded.text.count("<BOS>") and not masked.weights_T[bos].any()
        assert not any(after == before + 1 for before, after in pairwise(bos)), (stem, name)


def text_of(masked: Any, token: int) -> str:
    """The characters that a token came from."""
    found: str = masked.encoded.text[masked.encoded.start_T[token] : masked.encoded.end_T[token]]
    return found
