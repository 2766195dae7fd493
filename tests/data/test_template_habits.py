"""Templates of unusual habits: what must train, written by hand, or the reason why nothing can."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
from tokenizers import AddedToken

from data.families import SOURCE, STRINGS, tokenizer_for, trained
from data.habits import CHATS, EXTRA, HABITS, REFUSED
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat
from luthier.data.mask import Masker
from luthier.data.template import Template


def masker(text: str, name: str) -> Masker:
    made = Template(text, STRINGS, name, now=datetime(2024, 5, 6, tzinfo=UTC))
    tokenizer = tokenizer_for(made)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in EXTRA.get(name, ())])
    return Masker(made, tokenizer)


@pytest.mark.parametrize("name", sorted(HABITS))
def test_trained_text_is_the_gold(name: str) -> None:
    text, chat, gold = HABITS[name]
    made = masker(text, name)
    masked = made.mask(Chat(CHATS[chat], SOURCE))
    assert trained(masked) == gold
    assert made.tokenizer.decode(masked.encoded.ids_T.tolist()) == masked.text
    last = np.flatnonzero(masked.weights_T)[-1]
    assert int(masked.encoded.ids_T[last]) in made.stop_ids


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_with_the_true_reason(name: str) -> None:
    text, chat, reason = REFUSED[name]
    with pytest.raises(DataError) as caught:
        masker(text, name).mask(Chat(CHATS[chat], SOURCE))
    assert reason in caught.value.line() and "rows.jsonl:7" in caught.value.line()
