"""D1-D4: how many masks are right, refused or wrong, beside transformers' and TRL's on the same rows.

    D1  generation markers of a template, read by brackets in their place: token for token
    D2  written gold of 88 templates in nine conversations; and every template at hand proven or refused by name
    D3  TRL's pairs: the mask of the original under train_generation_prompt beside the markers of its twin
    D4  the last trained token of every answer ends a generation

Right means the trained tokens are those of the gold; white space behind a stop token decides nothing, for us or them.
transformers: `apply_chat_template(return_assistant_tokens_mask=True)` on the template as it stands. TRL: the same with
the template of `get_training_chat_template`. Gold, readings and templates are those of the tests.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bench.data import Figure
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Source
from luthier.data.mask import Masked, Masker
from luthier.data.overrides import overridden
from luthier.data.policy import MaskPolicy
from luthier.data.template import Template

GOALS = ("D1", "D2", "D3", "D4")
_ROOT = Path(__file__).resolve().parents[2]
_TEMPLATES = Path(os.environ.get("LUTHIER_TEST_DATA", _ROOT.parent / "shared" / "data")) / "chat_templates"
_QUICK = ("trl__lfm2_2_5", "trl__qwen3", "trl__gptoss", "llamacpp__GLM-4.6", "trl__llama3", "trl__llama3_training")


def measure(quick: bool) -> list[Figure]:
    if not _TEMPLATES.is_dir():
        return [Figure("D2", "masks", "not measured", "", "", False, f"no templates at {_TEMPLATES.name}")]
    names = _QUICK if quick else tuple(path.stem for path in sorted(_TEMPLATES.glob("*.jinja")))
    cases = [case for name in names for case in _cases(name)]
    golden = [case for case in cases if case.gold is not None or case.refused]
    marked = [case for case in cases if case.masker.template.has_markers]
    conditions = f"{len(names)} templates, {len({case.chat for case in cases})} conversations each"
    return [
        _markers(marked, conditions), _gold(golden, conditions), _every(cases, conditions), _pairs(names, conditions),
        _stops(golden, conditions),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Case:
    """A template and a conversation: what we make of it, and the gold where there is some."""

    masker: Masker
    chat: str
    ours: Masked | None  # None: refused
    gold: list[tuple[int, int]] | None  # characters that must train
    refused: bool  # the gold says that this row is to be refused


def _reading() -> Any:
    """The tests' readings: their folder is not on the path of a bench."""
    tests = str(_ROOT / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    return import_module("data.gold_reading")


def _masker(stem: str, **policy: Any) -> Masker:
    families = import_module("data.families") if _reading() else None
    text = (_TEMPLATES / f"{stem}.jinja").read_text(encoding="utf-8")
    template = overridden(Template(text, families.STRINGS, stem))  # type: ignore[union-attr]
    return Masker(template, families.tokenizer_for(template), MaskPolicy(**policy))  # type: ignore[union-attr]


def _cases(stem: str) -> Iterator[_Case]:
    reading = _reading()
    entry, masker = dict(reading.entries()).get(stem), _masker(stem)
    for chat in reading.CHATS:
        ours = _mask(masker, chat)
        gold = None
        if entry and chat in entry["trained"]:
            shown = ours.text if ours else reading.rendered(masker.template.text, chat)
            gold = reading.places(shown, entry, chat)
        yield _Case(masker, chat, ours, gold, bool(entry) and chat in entry.get("refused", ()))


def _mask(masker: Masker, chat: str) -> Masked | None:
    reading = _reading()
    try:
        return masker.mask(Chat(reading.CHATS[chat], Source(chat, 1), reading.tools_of(chat)))
    except DataError:
        return None


def _theirs(case: _Case, template: str) -> tuple[np.ndarray, np.ndarray] | None:
    """What transformers trains with a template: the mask and the ids."""
    reading, tokenizer = _reading(), case.masker.tokenizer
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = tokenizer.apply_chat_template(
                reading.CHATS[case.chat], tools=reading.tools_of(case.chat), chat_template=template,
                return_dict=True, return_assistant_tokens_mask=True,
            )  # fmt: skip
    except Exception:  # noqa: BLE001 - a template or the tracker refuses
        return None
    return np.array(made["assistant_masks"], dtype=bool), np.array(made["input_ids"])


def _verdict(case: _Case, template: str | None) -> str:
    """right | other tokens | other text | nothing | refused: what transformers makes of a case with gold."""
    found = None if template is None else _theirs(case, template)
    if found is None or case.ours is None or case.gold is None:
        return "refused"
    mask, ids = found
    if not mask.any():
        return "nothing"
    if not np.array_equal(ids, case.ours.encoded.ids_T):
        return "other text"
    return "right" if np.array_equal(*_without_space(case, mask)) else "other tokens"


def _without_space(case: _Case, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A mask and the gold at the tokens that count: all but white space behind a stop."""
    assert case.ours is not None and case.gold is not None
    encoded, text = case.ours.encoded, case.ours.text
    wanted, free = np.zeros(len(mask), dtype=bool), np.zeros(len(mask), dtype=bool)
    for start, end in case.gold:
        rest = text[end:]
        wanted |= (encoded.start_T >= start) & (encoded.end_T <= end)
        free |= (encoded.start_T >= end) & (encoded.end_T <= end + len(rest) - len(rest.lstrip()))
    return mask[~free], wanted[~free]


def _training_template(case: _Case) -> str | None:
    """TRL's template for training, the template itself where it needs none, None where TRL has none."""
    trl = import_module("trl.chat_template_utils")
    tokenizer = case.masker.tokenizer
    tokenizer.chat_template = (_TEMPLATES / f"{case.masker.template.name}.jinja").read_text(encoding="utf-8")
    try:
        return trl.get_training_chat_template(tokenizer) or str(tokenizer.chat_template)
    except Exception:  # noqa: BLE001 - ValueError or RuntimeError by version
        return None


def _markers(cases: list[_Case], conditions: str) -> Figure:
    reading, ours, theirs, refused = _reading(), 0, 0, 0
    for case in cases:
        shown = reading.bracketed(case.masker.template.text, case.chat)
        if shown is None or case.ours is None:
            refused += (shown is None) == (case.ours is None)
            continue
        spans = reading.bracket_spans(shown)
        starts, ends = case.ours.encoded.start_T, case.ours.encoded.end_T
        wanted = np.zeros(len(starts), dtype=bool)
        for start, end in spans:
            wanted |= (starts >= start) & (ends <= end)
        ours += np.array_equal(case.ours.weights_T > 0, wanted)
        found = _theirs(case, case.masker.template.text)
        theirs += found is not None and np.array_equal(found[0], wanted)
    total = len(cases) - refused
    return Figure(
        "D1", "marker templates: masks equal to their markers, token for token", f"{ours} of {total}",
        f"transformers {theirs} of {total}", "all", ours == total,
        f"{conditions}; {refused} rows that the template cannot render are refused; control strings in content, and "
        "templates that want content as parts, are where transformers differs",
    )  # fmt: skip


def _gold(cases: list[_Case], conditions: str) -> Figure:
    counts: Counter[str] = Counter()
    stock: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for case in cases:
        if case.gold is None:
            counts["refused as written" if case.ours is None else "wrong"] += 1
            continue
        right = case.ours is not None and np.array_equal(*_without_space(case, case.ours.weights_T > 0))
        counts["right" if right else "refused" if case.ours is None else "wrong"] += 1
        stock[_verdict(case, (_TEMPLATES / f"{case.masker.template.name}.jinja").read_text("utf-8"))] += 1
        trained[_verdict(case, _training_template(case))] += 1
    return Figure(
        "D2", "trained text equal to written gold, token for token", _said(counts),
        f"transformers, template as it stands: {_said(stock)}; TRL's training template: {_said(trained)}",
        ">= 40 families, 0 wrong", not counts["wrong"] and not counts["refused"] and counts["right"] > 0,
        f"{conditions}; TRL's other tokens: role headers of GPT-OSS and DeepSeek, Phi-3's second stop, thinking blocks "
        "that the prompt supplies",
    )  # fmt: skip


def _every(cases: list[_Case], conditions: str) -> Figure:
    proven = Counter(case.chat for case in cases if case.ours is not None)
    chats = dict.fromkeys(case.chat for case in cases)
    templates = len({case.masker.template.name for case in cases})
    wrong = sum(case.ours is not None and not _holds(case) for case in cases)
    first = {case.masker.template.name: case for case in cases}.values()
    theirs = sum(_training_template(case) is not None for case in first)
    return Figure(
        "D2", "templates proven in each conversation, the others refused by name",
        ", ".join(f"{chat} {proven[chat]}" for chat in chats) + f" of {templates}; silently wrong {wrong}",
        f"TRL has a template to train with for {theirs} of {templates}", "0 silently wrong", not wrong, conditions,
    )  # fmt: skip


def _holds(case: _Case) -> bool:
    """Every answer's words are in the trained text, nobody else's are."""
    assert case.ours is not None
    runs = "\0".join(case.ours.text[turn.start : turn.end] for turn in case.ours.turns)
    for message in _reading().CHATS[case.chat]:
        words = str(message["content"]).split("</think>")[-1].strip()
        if words and (words in runs) != (message["role"] == "assistant"):
            return False
    return True


def _pairs(names: tuple[str, ...], conditions: str) -> Figure:
    parity, counts = import_module("data.test_template_parity") if _reading() else None, Counter[str]()
    for name in names:
        twin = f"{name}_training"
        if twin not in names:
            continue
        ours, theirs = _masker(name, train_generation_prompt=True), _masker(twin)
        for chat in _reading().CHATS:
            one, other = _mask(ours, chat), _mask(theirs, chat)
            if one is None or other is None or one.text != other.text:
                counts["refused or another text"] += 1
                continue
            wider = parity.TRAINED_WIDER.get(name.removeprefix("trl__"))  # type: ignore[union-attr]
            same = parity.same_tokens(one, other, *(wider or ((), "")))  # type: ignore[union-attr]
            counts["different" if not same else "equal but for one known string" if wider else "equal"] += 1
    return Figure(
        "D3", "masks of originals beside the markers of TRL's twins", _said(counts), "the twin itself",
        "equal on all pairs of equal text", not counts["different"], conditions,
    )  # fmt: skip


def _stops(cases: list[_Case], conditions: str) -> Figure:
    turns = stopped = 0
    for case in cases:
        for turn in case.ours.turns if case.ours else ():
            assert case.ours is not None
            inside = np.flatnonzero(case.ours.encoded.inside(turn.start, turn.end))
            text = [case.ours.text[case.ours.encoded.start_T[i] : case.ours.encoded.end_T[i]] for i in inside]
            last = next(int(i) for i, shown in zip(inside[::-1], text[::-1], strict=True) if shown.strip())
            turns += 1
            stopped += int(case.ours.encoded.ids_T[last]) in case.masker.stop_ids
    return Figure(
        "D4", "answers whose last trained token ends a generation", f"{stopped} of {turns}", "", "all",
        stopped == turns > 0, conditions,
    )  # fmt: skip


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1])) or "none"
