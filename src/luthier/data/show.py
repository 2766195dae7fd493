"""A sample as people and programs look at it: ids, tokens, which of them train, and the text that each token adds.

What is shown is what training reads: the same ids and marks. A pair is shown piece after piece (prompt, chosen,
rejected) with `parts` that say where each begins and ends; the text of an answer is decoded after its prompt, as the
model sees it. `extra` carries what the row says of each answer (label, margin); `weights` stand there where they are
not all 0 or 1; `remarks` say what of a conversation is not in the text, and what was changed on the way.
"""

from __future__ import annotations

from typing import Any

from luthier.contracts.record import Chat, Record, Sample
from luthier.data.encode import Encoder
from luthier.data.pairs import first_text


def shown(sample: Sample, tokenizer: Any) -> dict[str, Any]:
    """Plain data of a sample: source, ids, tokens, trained (0/1), text, pieces; parts and extra of preferences."""
    ids = [int(token) for piece in sample.pieces for token in piece.tokens]
    weights = [float(weight) for piece in sample.pieces for weight in piece.weights]
    trained = [int(weight > 0) for weight in weights]
    texts: list[str] = []
    for piece in sample.pieces:
        before = [int(token) for token in sample.pieces[piece.parent].tokens] if piece.parent >= 0 else []
        texts += text_pieces(tokenizer, before, [int(token) for token in piece.tokens])
    row: dict[str, Any] = {
        "source": str(sample.source), "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids), "trained": trained,
        "text": "".join(texts), "pieces": texts,
    }  # fmt: skip
    if set(weights) - {0.0, 1.0}:
        row["weights"] = weights
    if len(sample.pieces) > 1:
        row["parts"] = _parts(sample)
    if sample.extra:
        row["extra"] = {name: list(values[:2]) for name, values in sample.extra.items()}
    return row


def remarks(encoder: Encoder, record: Record | None) -> dict[str, Any]:
    """{"remarks": what the text of a conversation does not show, or shows otherwise}; empty where there is nothing."""
    text = None if record is None else first_text(record)
    if not isinstance(text, Chat):
        return {}
    masks = [encoder.masked(chat) for chat in encoder.per_answer(text)]
    said = [
        f"the reasoning of message {index} is not in the text: the chat template leaves it out "
        f"(data.mask.thinking: {encoder.policy.thinking})"
        for index in sorted(frozenset().union(*(masked.unshown for masked in masks)))
    ]
    if escaped := max(masked.escaped for masked in masks):
        said.append(f"control strings in the content that are ordinary text here: {escaped} (data.injection: escape)")
    return {"remarks": said} if said else {}


def text_pieces(tokenizer: Any, before: list[int], ids: list[int]) -> list[str]:
    """The text that each token adds after `before`, so that the pieces joined are the decoded text."""
    pieces, shown = [], tokenizer.decode(before)
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(before + ids[:end])
        whole = "" if text.endswith("\ufffd") and end < len(ids) else text[len(shown) :]
        pieces.append(whole)
        shown += whole
    return pieces


def _parts(sample: Sample) -> list[dict[str, Any]]:
    names = ["prompt", "chosen", "rejected"] if len(sample.pieces) == 3 else ["chosen", "rejected"]
    found, start = [], 0
    for name, piece in zip(names, sample.pieces, strict=True):
        found.append({"name": name, "start": start, "end": start + len(piece.tokens)})
        start += len(piece.tokens)
    return found
