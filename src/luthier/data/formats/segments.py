"""`segments`: one text in pieces, each with a label that says whether it trains (Axolotl's input_output); Segments.

    {"segments": [{"label": false, "text": "<s>Q: 1+1\\n"}, {"label": true, "text": "2</s>"}]}

No chat template and no token is added: what begins and ends the text stands in the pieces. An empty piece is kept out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.contracts.record import Segments, Source
from luthier.data.conversation import kind_of, list_cell, text_of, wrong

NAME = "segments"
COLUMNS = "segments (a list of {label, text})"
RANK = 5


def detect(row: Mapping[str, Any]) -> bool:
    return "segments" in row


def read(row: Mapping[str, Any], source: Source) -> Segments:
    made: list[tuple[str, bool]] = []
    for index, part in enumerate(list_cell(row.get("segments"), source, "segments", '[{"label": true, "text": "…"}]')):
        place = f"segments[{index}]"
        if not isinstance(part, Mapping):
            raise wrong("a segment is not an object", source, place, value=kind_of(part),
                        remedy='{"label": true, "text": "…"}')  # fmt: skip
        label = part.get("label")
        if not isinstance(label, bool):
            raise wrong("the label of a segment is not true or false", source, f"{place}.label", value=kind_of(label),
                        remedy="true where the text trains, false where it does not")  # fmt: skip
        text = text_of(part.get("text"), source, f"{place}.text", may_be_empty=True)
        if text:
            made.append((text, label))
    if not any(trained for _, trained in made):
        raise wrong("no segment trains", source, "segments", value=f"{len(made)} segments with text",
                    remedy="label true what is to be learned, or take the row out")  # fmt: skip
    return Segments(tuple(made), source)
