"""`unpaired`: one answer and whether it is good; a Judged.

The answer stands as in `messages`, `sharegpt`, `alpaca`, `query_response` or `prompt_completion`; beside it `label`
(TRL) or `kto_tag` (LLaMA-Factory): true or false. Numbers are no labels, because 1 to 5 stars would be read as "all
good". A file of conversations with a column `label` that means something else is read by naming its format in the
recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.contracts.record import Chat, Judged, Source
from luthier.data.conversation import kind_of, wrong
from luthier.data.formats import alpaca, messages, prompt_completion, query_response, sharegpt

NAME = "unpaired"
COLUMNS = "label | kto_tag, and messages | conversations | instruction output | prompt completion"
RANK = 4
_LABELS = ("label", "kto_tag")
_WORDS = {"true": True, "false": False}  # cells of a csv


def detect(row: Mapping[str, Any]) -> bool:
    return any(name in row for name in _LABELS) and any(
        (
            messages.detect(row),
            sharegpt.detect(row),
            alpaca.detect(row),
            query_response.detect(row),
            "prompt" in row and "completion" in row,
        )
    )


def read(row: Mapping[str, Any], source: Source) -> Judged:
    name = next(name for name in _LABELS if name in row)
    value = row.get(name)
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise wrong("the label is not true or false", source, name, value=kind_of(row.get(name)),
                    remedy="true or false; or set the source's format if the column means something else")  # fmt: skip
    forms = (messages, sharegpt, alpaca, query_response, prompt_completion)
    form = next(form for form in forms if form.detect(row))
    answer = form.read(row, source)
    if isinstance(answer, Chat):
        answer = replace(answer, weights=None)  # the last turn is what was judged
    return Judged(answer, value, source)
