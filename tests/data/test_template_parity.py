"""Masks beside the generation markers that people wrote by hand (D1), and beside TRL's marked twins (D3).

The markers are read by gold_reading.py: brackets in their place, transformers renders, the text is cut at the brackets.
Masks are compared token for token, with the offsets of the tokenizer itself where no content is neutralised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.families import STRINGS, tokenizer_for
from data.gold_reading import CHATS, bracket_spans, bracketed, tools_of
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Source
from luthier.data.mask import Masked, Masker
from luthier.data.policy import MaskPolicy
from luthier.data.template import Template

# pairs whose twin trains more than the answer and what the prompt adds behind the role's header, and what that is
TRAINED_WIDER = {
    "trl__deepseekv3": (("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"), ""),  # the role's own header, the end of results
    "trl__gptoss": (("<|start|>assistant",), ""),  # the role's own header
    "trl__qwen2_5": (("\n",), ""),  # the line break that ends the header
    "trl__phi3": ((), "<EOS>"),  # a second stop, which the template prints behind the last turn only
}
# twins that print another text: a thinking block in every turn, where the original has it after the last question only
OTHER_TEXT = {"trl__qwen3", "trl__qwen3_5_think", "trl__qwen3_5_nothink"}


def _row(name: str) -> Chat:
    return Chat(CHATS[name], Source(name, 1), tools_of(name))


def _masker(path: Path, **policy: Any) -> Masker:
    template = Template(path.read_text(encoding="utf-8"), STRINGS, path.stem)
    return Masker(template, tokenizer_for(template), MaskPolicy(**policy))


def _inside(masker: Masker, masked: Masked, spans: list[tuple[int, int]]) -> np.ndarray:
    """bool (T,): tokens whose characters lie in the spans."""
    starts, ends = masked.encoded.start_T, masked.encoded.end_T
    if not masked.escaped:
        tokens = masker.tokenizer(masked.text, add_special_tokens=False, return_offsets_mapping=True)
        assert tokens["input_ids"] == masked.encoded.ids_T.tolist()
        starts, ends = np.array(tokens["offset_mapping"]).T
    wanted = np.zeros(len(masked.encoded), dtype=bool)
    for start, end in spans:
        wanted |= (starts >= start) & (ends <= end)
    return wanted


def test_marker_templates_train_what_their_markers_say(shared_data: Callable[[str], Path]) -> None:
    counts: Counter[str] = Counter()
    paths = sorted(shared_data("chat_templates").glob("*.jinja"))
    for path in paths:
        masker = _masker(path)
        if not masker.template.has_markers:
            continue
        counts["templates"] += 1
        parity = _masker(path, train_generation_prompt=True)
        for name in CHATS:
            marked = bracketed(masker.template.text, name)
            if marked is None:  # transformers cannot render it, or it drops a part
                with pytest.raises(DataError, match=path.stem):
                    masker.mask(_row(name))
                counts["refused"] += 1
                continue
            masked = masker.mask(_row(name))
            wanted = _inside(masker, masked, bracket_spans(marked))
            assert np.array_equal(masked.weights_T > 0, wanted), (path.stem, name)
            same = parity.mask(_row(name))  # markers say it all already
            assert np.array_equal(same.weights_T, masked.weights_T), (path.stem, name)
            counts["equal"] += 1
    if len(paths) >= 108:  # the whole collection
        assert counts["templates"] >= 18 and counts["equal"] >= 150, counts


def test_originals_train_what_their_marked_twins_do(shared_data: Callable[[str], Path]) -> None:
    """With train_generation_prompt, modulo white space behind the stop: 11 pairs equal, 4 wider by one known string."""
    counts: Counter[str] = Counter()
    for path in sorted(shared_data("chat_templates").glob("*_training.jinja")):
        stem = path.stem.removesuffix("_training")
        twin, original = _masker(path), _masker(path.with_name(f"{stem}.jinja"), train_generation_prompt=True)
        for name in CHATS:
            try:
                theirs = twin.mask(_row(name))
            except DataError:
                with pytest.raises(DataError):
                    original.mask(_row(name))
                continue
            ours = original.mask(_row(name))
            if stem in OTHER_TEXT:
                counts["other text"] += ours.text != theirs.text
                continue
            assert ours.text == theirs.text and np.array_equal(ours.encoded.ids_T, theirs.encoded.ids_T), (stem, name)
            assert same_tokens(ours, theirs, *TRAINED_WIDER.get(stem, ((), ""))), (stem, name)
            counts["wider" if stem in TRAINED_WIDER else "equal"] += 1
    assert counts["equal"] >= 80 and counts["other text"] >= 20, counts


def same_tokens(ours: Masked, theirs: Masked, before: tuple[str, ...], behind: str) -> bool:
    """Whether they train what ours does and, token for token, one of `before` in front of each answer and `behind`
    the last one; white space behind a stop decides nothing."""
    text, encoded = ours.text, ours.encoded
    wanted, free = ours.weights_T > 0, np.zeros(len(encoded), dtype=bool)
    for turn in ours.turns:
        for known in before:
            if text[: turn.start].endswith(known):
                wanted = wanted | encoded.inside(turn.start - len(known), turn.start)
        rest = text[turn.end :]
        free |= encoded.inside(turn.end, turn.end + len(rest) - len(rest.lstrip()))
    if behind and text.endswith(behind):
        wanted = wanted | encoded.inside(len(text) - len(behind), len(text))
    return bool(np.array_equal(wanted[~free], (theirs.weights_T > 0)[~free]))
