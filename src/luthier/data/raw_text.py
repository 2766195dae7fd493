"""Rows without a chat template: a prompt with its completion, and plain text. What trains, and what begins and ends.

    Completion  prompt + completion + eos, one text; the completion and the stop token train
    Text        bos (if the tokenizer puts one before raw text) + text + eos; every token but the first trains

They are taken as written: control strings in them count, since people put whole rendered prompts there;
`data.injection: error` refuses them. A token that would hold letters of prompt and completion is cut in two, as
inference sees them, where the text decodes to the same; else the row is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.contracts.errors import DataError
from luthier.contracts.record import Completion, Source, Text
from luthier.data.vocabulary import Encoded, StraddleError, Vocabulary

Row = tuple[np.ndarray, np.ndarray, tuple[int, ...]]  # tokens_T, weights_T, places where it may be cut


@dataclass(frozen=True)
class RawText:
    """Raw rows of one tokenizer."""

    tokenizer: Any
    vocabulary: Vocabulary
    refuse_controls: bool = False

    def prompt_ids(self, prompt: str) -> list[int]:
        """What inference feeds before a completion."""
        ids: list[int] = self.vocabulary.encode(prompt).ids_T.tolist()
        return self._begin(ids) + ids

    def completion(self, record: Completion) -> Row:
        encoded = self.encoded(record.prompt + record.completion, record.source)
        try:
            inside = encoded.inside(len(record.prompt), len(encoded.text))
        except StraddleError:
            encoded, inside = self._joined(record)
        ids = encoded.ids_T.tolist()
        begin, end = self._begin(ids), self._end(ids)
        weights = [0.0] * len(begin) + inside.astype(np.float32).tolist() + [1.0] * len(end)
        return _row(begin + ids + end, weights)

    def _joined(self, record: Completion) -> tuple[Encoded, np.ndarray]:
        """Prompt and completion tokenised apart, as inference does, where one token would hold letters of both."""
        first, second = self.encoded(record.prompt, record.source), self.encoded(record.completion, record.source)
        ids = np.concatenate([first.ids_T, second.ids_T])
        text = record.prompt + record.completion
        if self.tokenizer.decode(ids.tolist()) != self.tokenizer.decode(self.vocabulary.encode(text).ids_T.tolist()):
            raise DataError(
                "the border of prompt and completion falls inside a token", where=str(record.source),
                value=f"{record.prompt[-12:]}|{record.completion[:12]}",
                remedy="end the prompt, or begin the completion, with white space",
            )  # fmt: skip
        joined = Encoded(
            text, ids, np.concatenate([first.start_T, second.start_T + len(record.prompt)]),
            np.concatenate([first.end_T, second.end_T + len(record.prompt)]),
        )  # fmt: skip
        return joined, np.arange(len(ids)) >= len(first)

    def text(self, record: Text) -> Row:
        ids = self.encoded(record.text, record.source).ids_T.tolist()
        whole = self._begin(ids) + ids + self._end(ids)
        return _row(whole, [0.0] + [1.0] * (len(whole) - 1))

    def encoded(self, text: str, source: Source) -> Encoded:
        encoded = self.vocabulary.encode(text)
        if self.refuse_controls:
            found = self.vocabulary.controls(encoded)
            if len(found):
                raise DataError(
                    "the row holds control strings", where=str(source),
                    value=sorted({self.vocabulary.names[int(encoded.ids_T[i])] for i in found}),
                    remedy="remove them, or set data.injection: allow",
                )  # fmt: skip
        return encoded

    def _begin(self, ids: Sequence[int]) -> list[int]:
        """bos where the tokenizer itself puts one before raw text, and the text does not begin with it."""
        first = self.vocabulary.begin_id
        known = {first, self.tokenizer.bos_token_id}
        return [] if first is None or (len(ids) and ids[0] in known) else [first]

    def _end(self, ids: Sequence[int]) -> list[int]:
        eos = self.vocabulary.eos_id
        if eos is None:
            raise DataError(
                "the tokenizer has no eos token, so nothing would end a generation", where="model",
                remedy="set eos_token in its tokenizer_config.json",
            )  # fmt: skip
        return [] if list(ids[-1:]) == [eos] else [eos]


def _row(ids: Sequence[int], weights: Sequence[float]) -> Row:
    weights_T = np.asarray(weights, dtype=np.float32)
    weights_T[:1] = 0.0
    return np.asarray(ids, dtype=np.int64), weights_T, ()
