"""What a report says of one row: its kind, lengths, language, task, shape, and the faults that can be read off it.

Faults are chosen for precision: what is counted is nearly always wrong, and what is wrong is not always counted. Each
belongs to one dimension of quality_report.py.

    correctness   broken characters (U+FFFD, UTF-8 read as Latin-1), control characters, an answer that is its prompt,
                  a placeholder for an answer, an answer that repeats itself (of 40 words or more, under a quarter of
                  its 4-grams are different: the loop of a model that did not stop)
    completeness  no answer, no prompt, the last turn is not the answer's, an answer cut off (its last character is a
                  comma, a dash or an open bracket, or its last word joins two others: "and", "the"), a code block or a
                  reasoning tag left open, a tool call without its result
    consistency   roles out of order, an answer in another script than its prompt (translations left out)
    safety        e-mail address, secret key, card number, listed word, an overlap that `decontaminate` noted

Words are runs between white space, and each ideograph or kana by itself. The language is the note of the `language`
step; without it the script. Leaves out what needs a model: whether an answer is true is the judge's to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Completion, Judged, Pair, Record, Text
from luthier.contracts.step import Item
from luthier.data.task_guess import guess
from luthier.data.texts import answer, prompt, whole

DIMENSIONS = ("correctness", "completeness", "consistency", "diversity", "safety")
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_IDEOGRAPH = re.compile(f"[{_IDEOGRAPHS}]")
_WORDS = re.compile(f"[{_IDEOGRAPHS}]|[^\\s{_IDEOGRAPHS}]+")
_SCRIPTS = [  # words of a script that has words, signs of one that has none
    ("ja", re.compile(r"[\u3040-\u30ff]")), ("ko", re.compile(r"[\uac00-\ud7af]+")),
    ("zh", re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")), ("Cyrillic script", re.compile(r"[\u0400-\u04ff]+")),
    ("Arabic script", re.compile(r"[\u0600-\u06ff]+")), ("Devanagari script", re.compile(r"[\u0900-\u097f]+")),
    ("he", re.compile(r"[\u0590-\u05ff]+")), ("el", re.compile(r"[\u0370-\u03ff]+")),
    ("th", re.compile(r"[\u0e00-\u0e7f]+")), ("Latin script", re.compile(r"[A-Za-z\u00c0-\u024f]+")),
]  # fmt: skip
_BEYOND_LATIN = re.compile(r"[\u0370-\u1dff\u3040-\ud7af]")
_READ = 4000  # characters by which a script is told
_BROKEN = re.compile("\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac[\u0098-\u201d\u2122\u0153]")
_BROKEN_SIGNS = ("\ufffd", "\u00c2", "\u00c3", "\u00e2\u20ac")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_PLACEHOLDER = re.compile(
    r"\W*(?:n/?a|none|null|nan|todo|tbd|no ?(?:out|in)put|no (?:answer|response)|placeholder|undefined|无|没有)\W*",
    re.IGNORECASE,
)
_CUT = re.compile(r"(?:[,({\[，（、]|\s[-–—]|\b(?:and|or|but|the|an|of|with|because|which|such as)|[和与或及])$")
_REFUSAL = re.compile(
    r"as an? (?:ai|artificial intelligence)(?: language)? model\b|i(?:'m| am) sorry,? but i can(?:not|'t)"
    r"|作为一个?(?:人工智能|ai)"
)
_OPENING = 400  # characters of an answer in which a refusal begins
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}")
_EXAMPLE = re.compile(r"@(?:[\w.-]+\.)?(?:example|test|invalid|localhost)(?:\.\w+)?$", re.IGNORECASE)
_SECRET = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{20,}|ghp_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}|xox[abprs]-[0-9A-Za-z-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_SECRET_SIGNS = ("sk-", "ghp_", "AKIA", "AIza", "xox", "-----BEGIN")  # told in a hundredth of the pattern's time
_CARD = re.compile(r"\d{4}(?:[ -]?\d){9,15}")

Detector = Callable[[str], Iterator[str]]  # text -> names of what should not stand in it


@dataclass(frozen=True, slots=True)
class Facts:
    """One row as the report counts it."""

    kind: str
    prompt: str
    answer: str
    prompt_words: int
    answer_words: int
    turns: int
    language: str
    task: str
    pair: str
    shape: tuple[str, ...]  # system, tools, tool calls, thinking: what the row has
    faults: Mapping[str, tuple[str, ...]]  # dimension -> faults
    refusal: bool


def facts(item: Item, detect: Detector | None = None) -> Facts:
    """Read one row."""
    record = item.record
    asked, said, everything = _texts(record)
    task = guess(_question(record, asked)) if asked else None
    name = task.name if task else "text"
    shape = tuple(_shape(record, said))
    faults = {
        "correctness": tuple(_incorrect(asked, said)),
        "completeness": tuple(_incomplete(record, asked, said)),
        "consistency": tuple(_inconsistent(record, asked, said, name)),
        "safety": tuple(dict.fromkeys(_unsafe(item, everything, detect))),
    }
    language = item.notes.get("language")
    return Facts(
        type(record).__name__.lower(), asked, said, words(asked), words(said), _turns(record),
        language if isinstance(language, str) else script(said or asked), name, task.pair if task else "",
        shape, faults, bool(_REFUSAL.search(said[:_OPENING].lower())),
    )  # fmt: skip


def _texts(record: Record) -> tuple[str, str, str]:
    """Prompt, answer and all that is said; nothing of a row that has no words, such as one of token ids."""
    try:
        return prompt(record), answer(record), whole(record)
    except DataError:
        return "", "", ""


def words(text: str) -> int:
    """Runs between white space; each ideograph by itself."""
    return len(word_list(text))


def word_list(text: str) -> list[str]:
    """The words that `words` counts."""
    return text.split() if text.isascii() or not _IDEOGRAPH.search(text) else _WORDS.findall(text)


def script(text: str) -> str:
    """The script most words are of, or the one language that is written in it; "none" without letters."""
    seen = text[:_READ]
    if seen.isascii() or not _BEYOND_LATIN.search(seen):
        return "Latin script" if _SCRIPTS[-1][1].search(seen) else "none"
    counts = {name: len(letters.findall(seen)) for name, letters in _SCRIPTS}
    if counts["ja"] * 4 > counts["zh"]:  # kana: the ideographs beside them are Japanese
        counts["ja"] += counts.pop("zh")
    name = max(counts, key=lambda one: counts[one])
    return name if counts[name] else "none"


def chat_of(record: Record) -> Chat | None:
    """The conversation of a record, where it has one; of a pair the chosen one."""
    if isinstance(record, Pair):
        record = record.chosen
    elif isinstance(record, Judged):
        record = record.answer
    return record if isinstance(record, Chat) else None


def _question(record: Record, asked: str) -> str:
    chat = chat_of(record)
    turns = [m.get("content") for m in chat.messages if m["role"] == "user"] if chat else []
    last = turns[-1] if turns else None
    return last if isinstance(last, str) else asked


def _turns(record: Record) -> int:
    chat = chat_of(record)
    return (
        sum(m["role"] in ("user", "assistant") for m in chat.messages) if chat else 1 if isinstance(record, Text) else 2
    )


def _shape(record: Record, said: str) -> Iterator[str]:
    chat = chat_of(record)
    messages = chat.messages if chat else ()
    if any(m["role"] in ("system", "developer") for m in messages):
        yield "system prompt"
    if chat and chat.tools:
        yield "declared tools"
    if any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
        yield "tool calls"
    if any(m.get("reasoning_content") for m in messages) or "<think>" in said:
        yield "reasoning"


def _incorrect(asked: str, said: str) -> Iterator[str]:
    if any(not text.isascii() and _broken(text) for text in (said, asked)):
        yield "broken characters"
    if _CONTROL.search(said) or _CONTROL.search(asked):
        yield "control characters"
    if asked and said and " ".join(asked.split()).casefold() == " ".join(said.split()).casefold():
        yield "the answer is the prompt"
    if len(said) < 40 and _PLACEHOLDER.fullmatch(said):
        yield "a placeholder for an answer"
    if _repeats(said):
        yield "the answer repeats itself"


def _broken(text: str) -> bool:
    """The signs first: a pattern that begins with a class is slow where nothing matches."""
    return any(sign in text for sign in _BROKEN_SIGNS) and bool(_BROKEN.search(text))


def _repeats(said: str) -> bool:
    if len(said) < 80:
        return False
    tokens = word_list(said)
    grams = len(tokens) - 3
    if grams < 37 or (len(set(tokens)) - 3) * 4 >= grams:  # a word that is new begins a 4-gram that is new
        return False
    return len(set(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))) * 4 < grams


def _incomplete(record: Record, asked: str, said: str) -> Iterator[str]:
    chat = chat_of(record)
    called = bool(chat and chat.messages and chat.messages[-1].get("tool_calls"))
    answers = isinstance(record, Chat | Completion | Pair | Judged)
    if answers and not said.strip() and not called:
        yield "no answer"
    if answers and not asked.strip():
        yield "no prompt"
    if chat and chat.messages and chat.messages[-1]["role"] != "assistant":
        yield "the last turn is no answer"
    if answers and len(said) >= 40 and _CUT.search(said.rstrip()[-24:]):
        yield "an answer cut off"
    if said.count("```") % 2:
        yield "a code block left open"
    if said.count("<think>") > said.count("</think>"):
        yield "a reasoning tag left open"
    if chat and any(_unanswered(now, then) for now, then in pairwise(chat.messages)):
        yield "a tool call without its result"


def _unanswered(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    return bool(now.get("tool_calls")) and then["role"] != "tool"


def _inconsistent(record: Record, asked: str, said: str, task: str) -> Iterator[str]:
    chat = chat_of(record)
    if chat:
        roles = [m["role"] for m in chat.messages]
        spoken = [role for role in roles if role not in ("system", "developer")]
        twice = any(now == then != "tool" for now, then in pairwise(spoken))
        late = len(spoken) < len(roles) and roles[0] in spoken  # a system prompt that does not come first
        if twice or late or spoken[:1] in (["assistant"], ["tool"]):
            yield "roles out of order"
    if task in ("text", "translation", "code") or len(said) < 24 or len(asked) < 24:
        return
    mine, other = script(said), script(asked[-_READ:])
    if mine != other and "none" not in (mine, other):
        yield "another script than its prompt"


def _unsafe(item: Item, text: str, detect: Detector | None) -> Iterator[str]:
    yield from (detect or left_behind)(text)
    if item.notes.get("overlap"):
        yield "overlaps an evaluation set"


def left_behind(text: str) -> Iterator[str]:
    """What should not stand in a set that is handed on: addresses (but for those made for examples), keys, cards."""
    if "@" in text and any(not _EXAMPLE.search(one) for one in _EMAIL.findall(text)):
        yield "e-mail address"
    if any(sign in text for sign in _SECRET_SIGNS) and _SECRET.search(text):
        yield "secret key"
    if any(_luhn(found.group()) and _alone(text, *found.span()) for found in _CARD.finditer(text)):
        yield "card number"


def listed(phrases: frozenset[str]) -> Detector:
    """A detector that also knows words of a list of the user's own, as whole words, in any case."""
    pattern = re.compile(
        "|".join(rf"(?<!\w){re.escape(one)}(?!\w)" for one in sorted(phrases)) or r"(?!)", re.IGNORECASE
    )

    def detect(text: str) -> Iterator[str]:
        yield from left_behind(text)
        if pattern.search(text):
            yield "a listed word"

    return detect


def _alone(text: str, begin: int, end: int) -> bool:
    """Whether the digits are no part of a longer number, of a sum or of a decimal."""
    before, after = text[max(begin - 2, 0) : begin], text[end : end + 2]
    return not re.search(r"[\d.=+*/^]\s?$", before) and not re.match(r"\s?[\d=+*/^]|\.\d", after)


def _luhn(found: str) -> bool:
    """A number as cards bear them: 15 digits of one issuer, 16 of the others, and the check digit right."""
    digits = [int(one) for one in found if one.isdigit()]
    doubled = [d if at % 2 == 0 else d * 2 - 9 * (d > 4) for at, d in enumerate(reversed(digits))]
    issued = (len(digits), digits[0]) in ((15, 3), (16, 2), (16, 4), (16, 5), (16, 6))
    return issued and len(set(digits)) > 1 and sum(doubled) % 10 == 0
