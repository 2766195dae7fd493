"""Exact match: the greedy answer equals the expected one, compared after stripping outer white space.

A row is a question and its last assistant turn (Chat) or a prompt and its completion (Completion), of a pair the
chosen one; the model sees the same prompt ids as in training (`prompt_of`). Rows without such an answer are
counted, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Completion, Record
from luthier.data.pairs import first_text


@dataclass(frozen=True, slots=True)
class Answer:
    """One row of the comparison: where it came from, the expected text and the text that the model gave."""

    source: str
    prompt: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        return self.given.strip() == self.expected.strip()


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt as the template wants it, and the answer to expect."""

    record: Chat | Completion
    prompt: str
    expected: str


def question(record: Record) -> Question | None:
    """The question of a row, or None where it has none (plain text, no closing assistant turn)."""
    record = first_text(record)
    if isinstance(record, Completion):
        return Question(record, record.prompt, record.completion)
    if isinstance(record, Chat) and len(record.messages) > 1 and record.messages[-1]["role"] == "assistant":
        expected = record.messages[-1].get("content") or ""
        if not expected.strip():
            return None
        prompt = str(record.messages[-2].get("content") or "")
        return Question(Chat(record.messages[:-1], record.source, record.tools), prompt, expected)
    return None


def exact_match(
    records: Sequence[Record],
    prompt_of: Callable[[Chat | Completion], list[int]],
    respond: Callable[[list[list[int]]], list[str]],
) -> dict[str, Any]:
    """`exact_match` (share), `rows` compared, `rows_without_answer`, and the `answers` themselves."""
    questions = [found for record in records if (found := question(record)) is not None]
    if not questions:
        raise DataError("no row has an answer to compare with", remedy="exact match needs prompts and answers")
    given = respond([prompt_of(found.record) for found in questions])
    answers = [
        Answer(str(found.record.source), found.prompt, found.expected, text)
        for found, text in zip(questions, given, strict=True)
    ]
    right = sum(answer.right for answer in answers)
    return {
        "exact_match": right / len(answers),
        "rows": len(answers),
        "rows_without_answer": len(records) - len(questions),
        "answers": answers,
    }
