"""`tokens`: rows that were tokenised before; Tokens.

`input_ids` and `labels` (the id where it is trained, -100 where it is not), or instead of labels a mask of 0 and 1:
`completion_mask`, `assistant_masks` (TRL). `attention_mask` 0 marks padding at either end, which is taken off; a hole
in the middle is an error, since nothing says what it means. Ids are checked against the vocabulary when they are
encoded. Leaves out: `position_ids` and rows packed of several, which Luthier packs itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.contracts.record import Source, Tokens
from luthier.data.conversation import kind_of, list_cell, wrong

NAME = "tokens"
COLUMNS = "input_ids labels | input_ids completion_mask [attention_mask]"
RANK = 1
NOT_TRAINED = -100
_MASKS = ("completion_mask", "assistant_masks")
_OTHER_SHAPES = {"text", "messages", "conversations", "prompt", "instruction"}


def detect(row: Mapping[str, Any]) -> bool:
    if "input_ids" not in row:
        return False
    return any(name in row for name in ("labels", *_MASKS)) or not _OTHER_SHAPES & row.keys()


def read(row: Mapping[str, Any], source: Source) -> Tokens:
    ids = _whole_numbers(row, "input_ids", source)
    mask = next((name for name in _MASKS if row.get(name) is not None), None)
    if row.get("labels") is not None:
        name, labels = "labels", _whole_numbers(row, "labels", source)
    elif mask:
        name, chosen = mask, _switches(row, mask, source)
        labels = [token if on else NOT_TRAINED for token, on in zip(ids, chosen, strict=False)]
        labels += [NOT_TRAINED] * (len(chosen) - len(ids))
    else:
        raise wrong("nothing says which tokens train", source, "labels", value=kind_of(row.get("labels")),
                    remedy="give labels: the id where it is trained, -100 where it is not")  # fmt: skip
    _same_length(ids, labels, name, source)
    start, end = _real(row, ids, source)
    for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (NOT_TRAINED, token):
            raise wrong("a label is neither -100 nor the token at its place", source, f"labels[{index}]",
                        value=f"label {label}, token {token}",
                        remedy="labels are not shifted: labels[i] is input_ids[i] or -100")  # fmt: skip
        if label != NOT_TRAINED and not start <= index < end:
            raise wrong("a token of the padding is trained", source, f"labels[{index}]", value="attention_mask 0",
                        remedy="set its label to -100")  # fmt: skip
    return Tokens(tuple(ids[start:end]), tuple(labels[start:end]), source)


def _real(row: Mapping[str, Any], ids: list[int], source: Source) -> tuple[int, int]:
    """The stretch that is not padding."""
    if row.get("attention_mask") is None:
        return 0, len(ids)
    mask = _switches(row, "attention_mask", source)
    _same_length(ids, mask, "attention_mask", source)
    start = mask.index(1) if 1 in mask else 0
    count = sum(mask)
    if not count or not all(mask[start : start + count]):
        raise wrong("the attention mask is not one stretch of 1", source, "attention_mask", value=f"{count} times 1",
                    remedy="0 may mark padding before or after the tokens only")  # fmt: skip
    return start, start + count


def _whole_numbers(row: Mapping[str, Any], name: str, source: Source) -> list[int]:
    values = list_cell(row.get(name), source, name, "[1, 2, 3]")
    if not values:
        raise wrong("there are no tokens", source, name, value="an empty list", remedy="take the row out")
    for index, value in enumerate(values):
        if type(value) is not int:
            raise wrong("not a whole number", source, f"{name}[{index}]", value=kind_of(value), remedy="token ids")
    return list(values)


def _switches(row: Mapping[str, Any], name: str, source: Source) -> list[int]:
    values = list_cell(row.get(name), source, name, "[0, 1, 1]")
    for index, value in enumerate(values):
        if value not in (0, 1):
            raise wrong("neither 0 nor 1", source, f"{name}[{index}]", value=kind_of(value), remedy="write 0 or 1")
    return [int(value) for value in values]


def _same_length(ids: list[int], other: list[int], name: str, source: Source) -> None:
    if len(ids) != len(other):
        raise wrong("two columns of one row differ in length", source, name,
                    value=f"{len(other)}, input_ids {len(ids)}", remedy="one value for each token")  # fmt: skip
