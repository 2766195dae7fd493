"""Masks beside the generation markers that people wrote by hand (D1), and beside TRL's marked twins (D3).

The markers are read by gold_reading.py: brackets in their place, transformers renders, the text is cut at the brackets.
Masks are compared token for token, with the offsets of the tokenizer itself where no content is neutralised.
"""

from __future__ import annotations

import importlib.util
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
    "deepseekv3": (("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"), ""),  # the role's own header, the end of results
    "deepseek_r1_distill": (("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"), ""),
    "gptoss": (("<|start|>assistant",), ""),  # the role's own header
    "muse_glimmer": (("<|start|>assistant",), ""),
    "qwen2_5": (("\n",), ""),  # the line break that ends the header
    "phi3": ((), "<EOS>"),  # a second stop, which the template prints behind the last turn only
    "phi3_5": ((), "<EOS>"),
}
# twins that print another text: a thinking block in every turn, where the original has it after the last question only;
# a call's words in one turn with it, where the original prints them as another turn
OTHER_TEXT = {"qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "deepseek_r1_distill"}
NO_STOP = {"diffusion_gemma"}  # its twin trains no stop token, which is refused


def _trl() -> Path | None:
    """Where TRL keeps its templates, as it is installed here."""
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else None
    return folder if folder and folder.is_dir() else None


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


@pytest.mark.parametrize("where", ["collection", "installed"])
def test_originals_train_what_their_marked_twins_do(where: str, shared_data: Callable[[str], Path]) -> None:
    """With train_generation_prompt, modulo white space behind the stop: equal, or wider by one known string."""
    folder = shared_data("chat_templates") if where == "collection" else _trl()
    if folder is None:
        pytest.skip("TRL is not installed")
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*_training.jinja")):
        stem = path.stem.removesuffix("_training")
        name = stem.removeprefix("trl__")
        twin, original = _masker(path), _masker(path.with_name(f"{stem}.jinja"), train_generation_prompt=True)
        for chat in CHATS:
            counts[_compared(name, chat, twin, original)] += 1
    assert counts["equal"] >= 80 and counts["other text"] >= 20 and counts["wider"] >= 30, counts


def _compared(name: str, chat: str, twin: Masker, original: Masker) -> str:
    """How the two masks of a conversation compare; fails where they should be equal and are not."""
    if name in NO_STOP:
        if any(not message.get("tool_calls") for message in CHATS[chat] if message["role"] == "assistant"):
            with pytest.raises(DataError, match=r"stop token|drops|leave out"):
                twin.mask(_row(chat))
        return "no stop"
    try:
        theirs = twin.mask(_row(chat))
    except DataError:
        with pytest.raises(DataError):
            original.mask(_row(chat))
        return "refused"
    try:
        ours = original.mask(_row(chat))
    except DataError:
        assert name in OTHER_TEXT, (name, chat)
        return "other text"
    if ours.text != theirs.text:
        assert name in OTHER_TEXT, (name, chat)
        return "other text"
    assert np.array_equal(ours.encoded.start_T, theirs.encoded.start_T), (name, chat)  # each has a tokenizer of its own
    assert same_tokens(ours, theirs, *TRAINED_WIDER.get(name, ((), ""))), (name, chat)
    return "wider" if name in TRAINED_WIDER else "equal"


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
