"""A tokenizer as the data room needs it: ids with exact character ranges, control tokens, neutralised text.

A text is always tokenised whole, once, without the tokenizer's own special tokens, and every id is tied to the
characters it came from. Offsets of the tokenizers library leave holes (trimmed spaces, dummy prefixes of
sentencepiece kinds, several byte tokens for one character); `Encoded` closes them:

    start_i = min(offset_i.start, largest end before i)         a gap of white space belongs to the token after it
    an empty range takes the gap up to the next token, or stays empty (a dummy prefix) and counts at its position

Control tokens are the added tokens that are special or look like markup; runs of spaces and plain words that some
tokenizers add are not. Text whose control strings must not count (`encode_neutral`) is cut at the control tokens
that may stay; what lies between is encoded by a twin of the tokenizer that has no added tokens at all. The
tokenizers library treats the text between added tokens independently, so nothing else changes; that the twin
gives the same ids where nothing is neutralised is checked on every such text, not assumed.

Left out: slow (Python) tokenizers, which give no offsets.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from luthier.contracts.errors import DataError
from luthier.data.template import MARKUP
from luthier.data.words import QuickWords, quick_words

Ints = np.ndarray  # int64 (T,)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text, its ids, and the characters `start_T[i]:end_T[i]` that token i came from."""

    text: str
    ids_T: Ints
    start_T: Ints
    end_T: Ints
    joined: bool = False  # each token begins where the one before ends, and none is empty

    def __len__(self) -> int:
        return len(self.ids_T)

    def inside(self, start: int, end: int) -> np.ndarray:
        """bool (T,): tokens of the span. A token across an edge belongs to the side that has its visible characters.

        White space decides nothing: `▁Hello` over the edge of "ASSISTANT: |Hello" is inside, `\\n\\n` over the start
        is outside. A token with visible characters on both sides raises StraddleError.
        """
        if self.joined:
            first, last = np.searchsorted(self.start_T, (start, end)).tolist()
            at = (self.start_T[first] if first < len(self) else -1, self.end_T[last - 1] if last else -1)
            if at == (start, end):
                whole = np.zeros(len(self), dtype=bool)
                whole[first:last] = True
                return whole
        chosen: np.ndarray = (self.start_T >= start) & (self.end_T <= end) & (self.start_T < end)
        crossing = np.flatnonzero(
            (self.end_T > self.start_T)
            & (((self.start_T < start) & (self.end_T > start)) | ((self.start_T < end) & (self.end_T > end)))
        )
        for i in crossing:
            token = self.text[self.start_T[i] : self.end_T[i]]
            first = self.start_T[i] + len(token) - len(token.lstrip())
            last = self.start_T[i] + len(token.rstrip())
            if first >= last:
                chosen[i] = False
            elif first >= start and last <= end:
                chosen[i] = True
            elif last <= start or first >= end:
                chosen[i] = False
            else:
                raise StraddleError(token, int(self.start_T[i]))
        return chosen


class StraddleError(Exception):
    """A token has visible characters on both sides of the edge of a span."""

    def __init__(self, token: str, at: int) -> None:
        self.token, self.at = token, at
        super().__init__(token)


class Vocabulary:
    """Wraps a fast tokenizer. `markup` are strings that count as control tokens where the tokenizer has them."""

    def __init__(self, tokenizer: Any, markup: Collection[str] = ()) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "the tokenizer gives no character offsets, so no mask can be proven",
                where=str(getattr(tokenizer, "name_or_path", "") or "tokenizer"), value=type(tokenizer).__name__,
                remedy="use its fast form (a tokenizer.json beside the model)",
            )  # fmt: skip
        self.tokenizer = tokenizer
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        self.added = {str(token.content): int(index) for index, token in tokenizer.added_tokens_decoder.items()}
        special = {str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special}
        known = set(markup)
        self.control = {
            text: index
            for text, index in self.added.items()
            if text.strip() and (text in special or text in known or MARKUP.fullmatch(text))
        }  # fmt: skip
        self.size = max([len(tokenizer), *(index + 1 for index in self.added.values())])
        self._is_control = np.zeros(self.size, dtype=bool)
        self._is_control[list(self.control.values())] = True
        self.names = {index: text for text, index in self.control.items()}
        longest_first = sorted(self.control, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.unknown: int | None = self.added.get(str(tokenizer.unk_token))
        self._twins: tuple[Tokenizer, Tokenizer] | None = None
        self._check_round_trip()

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @cached_property
    def begin_id(self) -> int | None:
        """The token that the tokenizer itself puts before raw text (its bos, as a rule), or None."""
        plain = self.encode("a").ids_T.tolist()
        full = self.backend.encode("a", add_special_tokens=True).ids
        return full[0] if full[1 : 1 + len(plain)] == plain and full[: len(plain)] != plain else None

    def encode(self, text: str) -> Encoded:
        """Whole text, once, no special tokens added by the tokenizer."""
        if self.backend.truncation is not None:
            self.backend.no_truncation()
        if self.backend.padding is not None:
            self.backend.no_padding()
        if self.backend.encode_special_tokens:
            self.backend.encode_special_tokens = False
        if self.quick is not None and (found := self.quick.encode(text)) is not None:
            return Encoded(text, *found[:3], joined=found[3])
        made = self.backend.encode(text, add_special_tokens=False)
        return self._encoded(text, made.ids, made.offsets)

    @cached_property
    def quick(self) -> QuickWords | None:
        """The same ids and characters word by word, where the tokenizer is of a kind that allows it (words.py)."""
        return quick_words(self.tokenizer)

    def controls(self, encoded: Encoded) -> Ints:
        """Positions of control tokens. The unknown token is one only where it was written out."""
        found = np.flatnonzero(self._is_control[encoded.ids_T])
        if self.unknown is None:
            return found
        doubtful = found[encoded.ids_T[found] == self.unknown]
        word = str(self.tokenizer.unk_token)
        never = [i for i in doubtful if encoded.text[encoded.start_T[i] : encoded.end_T[i]].strip() != word]
        return found[~np.isin(found, never)] if never else found

    def encode_neutral(self, encoded: Encoded, drop: Ints) -> Encoded:
        """The same text with the control tokens at positions `drop` encoded as the characters they are written in."""
        controls = self.controls(encoded)
        kept = controls[~np.isin(controls, drop)]
        every = self._sections(encoded, controls)
        made = self._sections(encoded, kept)
        left = len(self.controls(made))
        if not np.array_equal(every.ids_T, encoded.ids_T) or left != len(kept):
            raise DataError(
                "control strings in the content cannot be neutralised with this tokenizer",
                where=str(self.tokenizer.name_or_path or "tokenizer"),
                value=sorted({self.names[int(i)] for i in encoded.ids_T[drop]}),
                remedy="remove them from the row, or set data.injection: error | allow",
            )  # fmt: skip
        return made

    def _sections(self, encoded: Encoded, kept: Ints) -> Encoded:
        """Encode between the kept control tokens with the twin that knows no added tokens."""
        first, later = self._made_twins()
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        edges = [(int(encoded.start_T[i]), int(encoded.end_T[i]), int(encoded.ids_T[i])) for i in kept]
        for start, end, index in [*edges, (len(encoded.text), len(encoded.text), -1)]:
            if start > position:
                twin = first if position == 0 else later
                made = twin.encode(encoded.text[position:start], add_special_tokens=False)
                ids.extend(made.ids)
                offsets.extend((a + position, b + position) for a, b in made.offsets)
            if index >= 0:
                ids.append(index)
                offsets.append((start, end))
            position = end
        return self._encoded(encoded.text, ids, offsets)

    def _made_twins(self) -> tuple[Tokenizer, Tokenizer]:
        """Without control tokens: one for the beginning of a text, one for later (no prefix there)."""
        if self._twins is None:
            described = json.loads(self.backend.to_str())
            described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] not in self.control]
            described["post_processor"] = None
            first = Tokenizer.from_str(json.dumps(described))
            later = json.loads(json.dumps(described).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"'))
            self._twins = (first, Tokenizer.from_str(json.dumps(later)))
        return self._twins

    def _encoded(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Encoded:
        ids_T = np.fromiter(ids, dtype=np.int64, count=len(ids))
        if not len(ids_T):
            if text.strip():
                raise self._lossy(text)
            return Encoded(text, ids_T, ids_T, ids_T)
        flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(ids_T))
        pairs = flat.reshape(-1, 2)
        start_T, end_T = pairs[:, 0], pairs[:, 1].copy()
        reached_T = np.maximum.accumulate(end_T)
        before_T = np.concatenate(([0], reached_T[:-1]))
        for i in np.flatnonzero(start_T > before_T):
            gap = text[before_T[i] : start_T[i]]
            if i and self._composes and _are_marks(gap):  # they went into the letter before (NFC): its token's
                end_T[i - 1] = before_T[i] = start_T[i]
            elif not gap.isspace():
                raise self._lossy(gap)
        tail = text[reached_T[-1] :]
        if self._composes and _are_marks(tail):
            end_T[-1] = len(text)
        elif tail.strip():
            raise self._lossy(tail)
        empty = np.flatnonzero(start_T == end_T)
        start_T = np.minimum(start_T, before_T)
        if len(empty):
            full = np.flatnonzero(pairs[:, 0] < pairs[:, 1])
            following = np.searchsorted(full, empty)
            for i, k in zip(empty, following, strict=True):
                limit = int(pairs[full[k], 0]) if k < len(full) else len(text)
                end_T[i] = max(limit, int(start_T[i]))
        return Encoded(text, ids_T, start_T, end_T)

    @cached_property
    def _composes(self) -> bool:
        """Whether the tokenizer's normaliser puts combining marks into their letters (NFC), which loses nothing."""
        normalizer = self.backend.normalizer
        return normalizer is not None and normalizer.normalize_str("e\u0301") == "\u00e9"

    def _lossy(self, lost: str) -> DataError:
        return DataError(
            "the tokenizer loses characters, so the text cannot be followed to its tokens",
            where=str(self.tokenizer.name_or_path or "tokenizer"), value=lost[:40],
            remedy="remove them from the row, or use a tokenizer that covers every character",
        )  # fmt: skip

    def _check_round_trip(self) -> None:
        """Ids back to text must give the text: otherwise generation cannot give back what was trained."""
        text = "Say hello: a b  c,\n\n1 + 2."
        back = self.tokenizer.decode(self.encode(text).ids_T.tolist(), clean_up_tokenization_spaces=False)
        if "".join(back.split()).lower() != "".join(text.split()).lower():
            raise self._lossy(f"{text!r} came back as {back!r}")


def _are_marks(text: str) -> bool:
    """Combining marks and nothing else."""
    return bool(text) and all(unicodedata.category(letter)[0] == "M" for letter in text)
