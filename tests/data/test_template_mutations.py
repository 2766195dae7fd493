"""Grown and mutated templates: every mask is exact or refused, whatever somebody wrote.

Grown templates have a gold by construction. Of mutated ones nothing is known, so what must hold of any mask is
checked by string search and by the prompt of inference, which share no code with the masker.
"""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime

import pytest
from tokenizers import AddedToken

from data.families import SOURCE, STRINGS, TEMPLATES, chat, tokenizer_for, trained
from data.grown import grow, mutate
from data.habits import HABITS
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat
from luthier.data.mask import Masked, Masker
from luthier.data.template import Template

SEEDS = pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 150), marks=pytest.mark.nightly)], ids=len)
NOW = datetime(2024, 5, 6, tzinfo=UTC)
CHATS = ((("Why so?", "Because it is."), ("And now?", "Then that, too.")), (("One", "two"),), (("a", " b "),) * 3)


def attempt(text: str, *rows: Chat) -> list[tuple[Masker, Masked] | DataError]:
    """The mask of each row, or what refused it; any other exception goes through."""
    made: list[tuple[Masker, Masked] | DataError] = []
    try:
        template = Template(text, STRINGS, "changed", now=NOW)
        tokenizer = tokenizer_for(template)
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("[|", "]~b]", "[e~[")])
        masker = Masker(template, tokenizer)
    except DataError as error:
        return [error] * len(rows)
    for row in rows:
        try:
            made.append((masker, masker.mask(row)))
        except DataError as error:
            made.append(error)
    return made


@SEEDS
def test_grown_templates_train_what_they_were_built_to(seeds: range) -> None:
    counts: Counter[str] = Counter()
    rows = [chat(*[text for turn in turns for text in turn]) for turns in CHATS]
    for seed in seeds:
        grown = grow(random.Random(seed))
        for turns, found in zip(CHATS, attempt(grown.text, *rows), strict=True):
            if isinstance(found, DataError):
                assert not grown.plain, (seed, grown.text, found.line())
                counts["refused"] += 1
            else:
                assert trained(found[1]) == grown.trains(turns), (seed, grown.text)
                counts["proven"] += 1
    assert counts["proven"] >= 2 * len(seeds), counts


@SEEDS
def test_mutated_templates_are_exact_or_refused(seeds: range) -> None:
    """Anything but DataError fails here: an exception of jinja, a hang, a mask that is wrong on its face."""
    written = [*TEMPLATES.values(), *(text for text, _, _ in HABITS.values())]
    counts: Counter[str] = Counter()
    row = chat("Why so?", "Because it is.", "And now?", "Then that, too.")
    for seed in (n for each in seeds for n in (2 * each, 2 * each + 1)):
        rng = random.Random(seed)
        text = mutate(rng, rng.choice(written))
        (found,) = attempt(text, row)
        if isinstance(found, DataError):
            line = found.line()
            assert "\n" not in line and ("changed" in line or str(SOURCE) in line), text
            counts["refused"] += 1
        else:
            _check(*found, row, text)
            counts["proven"] += 1
    assert counts["proven"] >= len(seeds) / 5, counts


def _check(made: Masker, masked: Masked, row: Chat, text: str) -> None:
    """What any exact mask has: each answer once, in its run, and a stop token; no word of a question."""
    assert made.tokenizer.decode(masked.encoded.ids_T.tolist()) == masked.text
    shown = trained(masked)
    together = "".join(shown)
    assert together.count("Because it is.") == together.count("Then that, too.") == 1, text
    assert "Why so?" not in together and "And now?" not in together, text
    assert together.index("Because it is.") < together.index("Then that, too."), text
    if made.template.has_markers:
        return  # its author says what trains
    for turn in masked.turns:
        assert masked.text[: turn.end].endswith(tuple(made.closers)), text
        prompt = made.template.render(row.messages[: turn.message], None, True)
        if masked.text.startswith(prompt):
            assert turn.start >= len(prompt) or not masked.text[turn.start : len(prompt)].strip(), text
