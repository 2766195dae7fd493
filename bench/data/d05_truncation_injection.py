"""D5, D6: cuts that keep masks exact, and control tokens made by what users wrote, beside transformers.

D5   a row cut to a limit is a slice of the whole row, its mask the same slice (truncate_left, truncate_right), or
     stretches that hold every trained token once (split). transformers: `return_assistant_tokens_mask` with
     `truncation` on the same template (it has markers), beside its own whole mask sliced
D6   rows whose words hold every control string of the template must give the control tokens of calm rows. Ours with
     masks on; transformers as it is, with `sanitize_control_tokens`, and with both that and masks
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bench.data import Figure
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Source
from luthier.data.mask import Masker
from luthier.data.template import Template

GOALS = ("D5", "D6")
_ROOT = Path(__file__).resolve().parents[2]
_TEMPLATES = Path(os.environ.get("LUTHIER_TEST_DATA", _ROOT.parent / "shared" / "data")) / "chat_templates"
_WORDS = ("a", "bee", "see the sea", "1 + 1 = 2", "你好", "padded  ", "x" * 40)


def measure(quick: bool) -> list[Figure]:
    return [*_cuts(300 if quick else 10000), *_injection(3 if quick else None)]


def _rig(name: str) -> Any:
    """A file of the tests: their folder is not on the path of a bench."""
    tests = str(_ROOT / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    return import_module(f"data.{name}")


def _cuts(cases: int) -> list[Figure]:
    families = _rig("families")
    template = families.template("marked")
    tokenizer = families.tokenizer_for(template)
    tokenizer.chat_template = template.text
    encoder, rng = _rig("test_overlong").Once("marked", numbered=False), random.Random(5)
    rows = [_talk(rng) for _ in range(40)]
    masks = [encoder.masker.mask(row).weights_T for row in rows]
    wrong: Counter[str] = Counter()
    for case in range(cases):
        number, how = rng.randrange(len(rows)), rng.choice(("left", "right", "split"))
        limit = rng.randint(8, len(masks[number]) - 1)
        wrong["ours"] += not _ours(encoder, rows[number], masks[number], limit, how)
        if how != "split" and case % 10 == 0:
            wrong[how] += 1
            wrong[f"theirs {how}"] += not _theirs(tokenizer, rows[number], limit, how)
    told = ", ".join(f"{wrong[f'theirs {how}']} of {wrong[how]} {how}" for how in ("left", "right"))
    return [
        Figure("D5", "cut rows whose mask is not the whole mask sliced",
               f"{wrong['ours']} of {cases} left, right, split", f"transformers: {told}", "0", wrong["ours"] == 0,
               "conversations of a template with markers, limits drawn at random; transformers on every tenth")
    ]  # fmt: skip


def _ours(encoder: Any, row: Chat, whole_T: np.ndarray, limit: int, how: str) -> bool:
    made = encoder.cut(row, limit, "split" if how == "split" else f"truncate_{how}")
    found = [] if isinstance(made, str) else [np.asarray(sample.pieces[0].weights) for sample in made]
    if how == "split":
        return sum(int(np.count_nonzero(shown)) for shown in found) == int(np.count_nonzero(whole_T))
    cut = (whole_T[-limit:] if how == "left" else whole_T[:limit]).copy()
    cut[:1] = 0.0
    return np.array_equal(found[0], cut) if found else not cut.any()


def _theirs(tokenizer: Any, row: Chat, limit: int, how: str) -> bool:
    tokenizer.truncation_side = how
    asked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    whole = tokenizer.apply_chat_template(row.messages, **asked)["assistant_masks"]
    cut = tokenizer.apply_chat_template(row.messages, truncation=True, max_length=limit, **asked)["assistant_masks"]
    return bool(list(cut) == list(whole[-limit:] if how == "left" else whole[:limit]))


def _talk(rng: random.Random) -> Chat:
    turns = [" ".join(rng.choices(_WORDS, k=rng.randint(1, 5))) for _ in range(2 * rng.randint(2, 4))]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return Chat(messages, Source("rows", 1))


def _injection(limit: int | None) -> list[Figure]:
    families, attacks = _rig("families"), _rig("attacks")
    paths = sorted(_TEMPLATES.glob("*.jinja"))[:limit] if _TEMPLATES.is_dir() else []
    texts = {path.stem: path.read_text(encoding="utf-8") for path in paths} or dict(families.TEMPLATES)
    counts: Counter[str] = Counter()
    for name, text in texts.items():
        template = Template(text, families.STRINGS, name)
        tokenizer = families.tokenizer_for(template)
        tokenizer.chat_template = text
        masker = Masker(template, tokenizer)
        words = "x".join(sorted(masker.vocabulary.control))
        pairs = zip(attacks.rows(words), attacks.rows("calm"), strict=True)
        for (kind, harm), (_, calm) in pairs:
            other = (harm.messages, harm.tools) != (calm.messages, calm.tools)
            if other and kind != "tags":  # calm rows of that kind hold a tag that is a control token itself
                _attack(masker, tokenizer, harm, calm, counts)
    rows = counts["rows"]
    told = f"{counts['plain']}; with sanitize_control_tokens {counts['sanitised']}, {counts['unsanitised']} refused"
    return [
        Figure("D6", "rows where a user's, tool's or system's words became control tokens",
               f"{counts['ours']} of {rows}", f"transformers {told}", "0", counts["ours"] == 0,
               f"{len(texts)} templates, every special token in 9 places, masks on for us alone; transformers takes "
               "those for control tokens that its template's text names"),
        Figure("D6", "the same with masks on in transformers: rows that it can do", f"{rows} of {rows}",
               f"{counts['both']} of {rows}", "all", True, "sanitize_control_tokens and return_assistant_tokens_mask"),
        Figure("D6", "calm rows whose ids are not those of the plain tokenizer", f"{counts['changed']} of {rows}", "",
               "0", counts["changed"] == 0, "the same rows with letters in place of the control strings"),
    ]  # fmt: skip


def _attack(masker: Masker, tokenizer: Any, harm: Chat, calm: Chat, counts: Counter[str]) -> None:
    try:
        found, expected = masker.mask(harm), masker.mask(calm)
    except DataError:
        return
    names = masker.vocabulary.names
    control = [names[int(i)] for i in expected.encoded.ids_T if int(i) in names]
    counts["rows"] += 1
    counts["ours"] += [names[int(i)] for i in found.encoded.ids_T if int(i) in names] != control
    counts["changed"] += not np.array_equal(masker.vocabulary.encode(expected.text).ids_T, expected.encoded.ids_T)
    for name, asked in (
        ("plain", {}), ("sanitised", {"sanitize_control_tokens": True}),
        ("both", {"sanitize_control_tokens": True, "return_assistant_tokens_mask": True}),
    ):  # fmt: skip
        ids = _asked(tokenizer, harm, asked)
        if ids is None:
            counts["unsanitised"] += name == "sanitised"
        elif name == "both":
            counts["both"] += 1
        else:
            given = _asked(tokenizer, calm, {}) or []
            counts[name] += [names[i] for i in ids if i in names] != [names[i] for i in given if i in names]


def _asked(tokenizer: Any, row: Chat, asked: dict[str, Any]) -> Sequence[int] | None:
    """What transformers makes of a row, or None where it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = tokenizer.apply_chat_template(
                row.messages, tools=row.tools, tokenize=True, return_dict=True, **asked
            )  # fmt: skip
    except Exception:  # noqa: BLE001 - whatever a template or transformers raises
        return None
    return [int(i) for i in made["input_ids"]]
