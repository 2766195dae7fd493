"""`stepwise`: the steps of a solution and whether each is right (TRL's stepwise supervision); a Stepwise.

`prompt` is a text, `completions` a list of texts, `labels` as many of true or false. Numbers are no labels: data sets
of ratings use -1, 0 and 1, and which of them is "right" is for their owner to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.contracts.record import Source, Stepwise
from luthier.data.conversation import kind_of, list_cell, text_of, wrong

NAME = "stepwise"
COLUMNS = "prompt completions labels"
RANK = 3


def detect(row: Mapping[str, Any]) -> bool:
    return "completions" in row and "labels" in row


def read(row: Mapping[str, Any], source: Source) -> Stepwise:
    steps = list_cell(row.get("completions"), source, "completions", '["first step", "second step", …]')
    labels = list_cell(row.get("labels"), source, "labels", "[true, false, …]")
    if not steps or len(steps) != len(labels):
        raise wrong("steps and labels do not go together", source, "labels",
                    value=f"{len(labels)} labels, {len(steps)} steps", remedy="one label for each step")  # fmt: skip
    for index, label in enumerate(labels):
        if not isinstance(label, bool):
            raise wrong("the label of a step is not true or false", source, f"labels[{index}]", value=kind_of(label),
                        remedy="write true or false")  # fmt: skip
    made = tuple(text_of(step, source, f"completions[{i}]") for i, step in enumerate(steps))
    return Stepwise(text_of(row.get("prompt"), source, "prompt"), made, tuple(labels), source)
