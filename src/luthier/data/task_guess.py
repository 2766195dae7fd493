"""What kind of task a prompt sets, and its verb and object: a rule of thumb in pure Python, for tables of a report.

Self-Instruct (arXiv:2212.10560, figure 3) parses each instruction and counts the root verb with its direct object.
Here there is no parser: the first sentence of the last thing asked is read for code and mathematics by their signs,
then for the first verb of a table (task_verbs.json), with the next word that is no article, pronoun or number as its
object; Chinese by the first key word of a table. What no rule knows is "other", and the report shows how many that
are. English and Chinese only; the tables are a choice of ours, not a standard.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

_TABLES = json.loads(Path(__file__).with_name("task_verbs.json").read_text("utf-8"))
_TASK_OF = {verb: task for task, verbs in reversed(_TABLES["verbs"].items()) for verb in verbs}
_CHINESE = [(word, task) for task, words in _TABLES["chinese"].items() for word in words]
_SKIPPED, _OPENING = frozenset(_TABLES["skipped"]), frozenset(_TABLES["opening"])
_WORD = re.compile(r"[a-z][a-z'-]*")
_HAN = re.compile(r"[㐀-鿿]")
_CODE = re.compile(
    r"```|\b(?:python|javascript|typescript|java|sql|html|css|c\+\+|golang|rust|bash|regex|regular expression|"
    r"function that|unit test|source code|write (?:a |the )?(?:code|program|script|query))\b"
    r"|def \w+\(|#include|select .+ from "
)
_MATHS = re.compile(r"\$[^$]*\\|\\(?:frac|sqrt|int|sum)|\d\s*[-+*/^=×÷]\s*\(?\d|\bx\^\d")
_HOW_MANY = re.compile(
    r"\bhow (?:many|much|long|old|far|fast)\b|\bwhat (?:percent|fraction|is the (?:total|sum|average))"
)
_DIGIT = re.compile(r"\d")
_READ = 2000  # characters of the question that are looked at


@dataclass(frozen=True, slots=True)
class Task:
    """`name` of the table, `verb` and `object` as they stand in the question ("" where none was found)."""

    name: str
    verb: str = ""
    object: str = ""

    @property
    def pair(self) -> str:
        return f"{self.verb} {self.object}" if self.verb and self.object else ""


NAMES = (*_TABLES["verbs"], "text", "other")


def guess(question: str) -> Task:
    """The task of what was asked last; "other" where no rule knows it."""
    asked = question[:_READ].strip()
    if len(_HAN.findall(asked[:200])) * 4 > len(asked[:200]):
        return _chinese(asked)
    lowered = asked.lower()
    words = _WORD.findall(lowered[:240])
    verb, thing = _verb(words)
    task = _TASK_OF.get(verb, "other")
    if _CODE.search(lowered):
        task = "code"
    elif _counts(lowered, task):
        task = "mathematics"
    return Task(task, verb, "" if _TASK_OF.get(verb) == "question answering" else thing)


def _counts(asked: str, task: str) -> bool:
    """A sum in signs, or a number in the text and the question how many."""
    if _HOW_MANY.search(asked) and _DIGIT.search(asked):
        return True
    return task in ("other", "question answering", "explanation", "extraction") and bool(_MATHS.search(asked))


def _verb(words: list[str]) -> tuple[str, str]:
    """The first verb of the table, its openings skipped, and the next word that means something."""
    at = 0
    while at < len(words) and words[at] in _OPENING and words[at : at + 2] != ["is", "it"]:
        at += 1
    if at and (at == len(words) or words[at] not in _TASK_OF) and words[0] in _TASK_OF:
        at = 0  # "can penguins fly": the opening was the question
    for i, word in enumerate(words[at : at + 12], at):
        if word in _TASK_OF:
            thing = next((w for w in words[i + 1 : i + 9] if w not in _SKIPPED and len(w) > 1), "")
            return word, thing
    return "", ""


def _chinese(asked: str) -> Task:
    found = [(asked.find(word), order, word, task) for order, (word, task) in enumerate(_CHINESE) if word in asked]
    if not found:
        return Task("other")
    strong = [one for one in found if one[3] in ("translation", "code", "mathematics")]
    _, _, word, task = min(strong or found)
    return Task(task, word)
