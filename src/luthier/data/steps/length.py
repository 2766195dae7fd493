"""`length`: rows that are too short or too long, counted in words, characters or tokens.

Limits are for the prompt (all before the answer), the answer and the row; and for how much longer the answer is than
the prompt. A limit that is not given does not exist; by default only answers without a word leave. A word is a run of
letters and digits; each Chinese, Japanese or Korean character is one, so that "100 words" is about as much in every
language. `unit: tokens` counts with the recipe's tokenizer, without the template around the texts; what training does
with rows beyond its limit is `data.overlong`.

    answer_to_prompt = words of the answer / words of the prompt      (counted in `unit`)

Plain text has no prompt: its limits are those of the answer and the row. Cost: 20 thousand rows a second and core or
more in words; in tokens what the tokenizer costs. Leaves out turns: a chat's answer is its last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from luthier.contracts.errors import RecipeError
from luthier.contracts.step import Item, Outcome, Room, RowStep, RowWork, each, keep, leave
from luthier.data.overlap import words
from luthier.data.texts import answer, prompt, whole

_LIMITS = ("least_prompt", "most_prompt", "least_answer", "most_answer", "least_row", "most_row")


@dataclass(frozen=True, kw_only=True)
class Length(RowStep):
    """Keep rows of a bearable length."""

    unit: Literal["words", "characters", "tokens"] = field(
        default="words", metadata={"doc": "What is counted; tokens are the recipe's tokenizer's."}
    )
    least_prompt: int | None = field(default=None, metadata={"doc": "Shorter prompts leave.", "unit": "words"})
    most_prompt: int | None = field(default=None, metadata={"doc": "Longer prompts leave.", "unit": "words"})
    least_answer: int | None = field(default=1, metadata={"doc": "Shorter answers leave.", "unit": "words"})
    most_answer: int | None = field(default=None, metadata={"doc": "Longer answers leave.", "unit": "words"})
    least_row: int | None = field(default=None, metadata={"doc": "Shorter rows leave.", "unit": "words"})
    most_row: int | None = field(default=None, metadata={"doc": "Longer rows leave.", "unit": "words"})
    least_answer_to_prompt: float | None = field(
        default=None,
        metadata={"doc": "Rows whose answer is less than so many times the prompt leave.", "unit": "times"},
    )
    most_answer_to_prompt: float | None = field(
        default=None,
        metadata={"doc": "Rows whose answer is more than so many times the prompt leave.", "unit": "times"},
    )

    def __post_init__(self) -> None:
        for name in (*_LIMITS, "least_answer_to_prompt", "most_answer_to_prompt"):
            limit = getattr(self, name)
            if limit is not None and limit < 0:
                raise RecipeError("a length is not negative", where=f"data.steps.length.{name}", value=limit)
            least = getattr(self, name.replace("most_", "least_"))
            if name.startswith("most_") and limit is not None and least is not None and least > limit:
                raise RecipeError("the least is above the most: no row would stay", where=f"data.steps.length.{name}",
                                  value=limit, remedy=f"{name.replace('most_', 'least_')} is {least}")  # fmt: skip

    def work(self, room: Room) -> RowWork:
        count = self._counter(room)
        ratio = self.least_answer_to_prompt is not None or self.most_answer_to_prompt is not None

        def one(item: Item) -> Outcome:
            lengths: dict[str, int] = {}
            for part, texts in (("prompt", prompt), ("answer", answer), ("row", whole)):
                least, most = getattr(self, f"least_{part}"), getattr(self, f"most_{part}")
                if least is None and most is None and not (ratio and part != "row"):
                    continue
                text = texts(item.record)
                if part == "prompt" and not text:
                    continue
                lengths[part] = length = count(text)
                if least is not None and length < least:
                    return leave(f"{part} shorter than {least} {self.unit}")
                if most is not None and length > most:
                    return leave(f"{part} longer than {most} {self.unit}")
            return self._compared(item, lengths) if "prompt" in lengths and ratio else keep(item)

        return each(one)

    def _compared(self, item: Item, lengths: dict[str, int]) -> Outcome:
        times = lengths["answer"] / max(1, lengths["prompt"])
        if self.least_answer_to_prompt is not None and times < self.least_answer_to_prompt:
            return leave(f"answer less than {self.least_answer_to_prompt:g} times the prompt")
        if self.most_answer_to_prompt is not None and times > self.most_answer_to_prompt:
            return leave(f"answer more than {self.most_answer_to_prompt:g} times the prompt")
        return keep(item)

    def _counter(self, room: Room) -> Callable[[str], int]:
        if self.unit == "characters":
            return len
        if self.unit == "words":
            return lambda text: len(words(text))
        if room.tokenizer is None:
            raise RecipeError("tokens are counted with the recipe's tokenizer, and there is none",
                              where="data.steps.length.unit", value=self.unit,
                              remedy="name model.path, or count words")  # fmt: skip
        tokenizer = room.tokenizer()
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
