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

from data.families import STRINGS, tokenizer_for
from data.gold_reading import CHATS as EVERY
from data.gold_reading import by_format, by_markers, entries, places, rendered, tools_of
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
