"""A sample as people and programs look at it: ids, tokens, which of them train, and the text that each token adds.

What is shown is what training reads: the same ids and marks. A pair is shown piece after piece (prompt, chosen,
rejected) with `parts` that say where each begins and ends; the text of an answer is decoded after its prompt, as the
model sees it. `extra` carries what the row says of each answer (label, margin).
"""

from __future__ import annotations

from typing import Any

from luthier.contracts.record import Sample


def shown(sample: Sample, tokenizer: Any) -> dict[str, Any]:
    """Plain data of a sample: source, ids, tokens, trained (0/1), text, pieces; parts and extra of preferences."""
    ids = [int(token) for piece in sample.pieces for token in piece.tokens]
    trained = [int(weight > 0) for piece in sample.pieces for weight in piece.weights]
    texts: list[str] = []
    for piece in sample.pieces:
        before = [int(token) for token in sample.pieces[piece.parent].tokens] if piece.parent >= 0 else []
        texts += text_pieces(tokenizer, before, [int(token) for token in piece.tokens])
    row: dict[str, Any] = {
        "source": str(sample.source), "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids), "trained": trained,
        "text": "".join(texts), "pieces": texts,
    }  # fmt: skip
    if len(sample.pieces) > 1:
        row["parts"] = _parts(sample)
    if sample.extra:
        row["extra"] = {name: list(values[:2]) for name, values in sample.extra.items()}
    return row


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
