"""Byte-level tokenising word by word: the ids of the tokenizers library, several times faster, or not at all.

A byte-level BPE (GPT-2, Llama 3, Qwen, OLMo, ...) works in three steps: cut the text at added tokens, cut what lies
between into words with a regular expression, merge inside each word. Words repeat, so each is merged once, by the
library's own model, and looked up ever after:

    text  --added tokens-->  sections  --regular expression-->  words  --table-->  ids

The second step is where another regular expression engine could differ, so it is taken here only for plain ASCII, for
which `\\p{L}`, `\\p{N}` and `\\s` are fixed sets. A section with other letters is first cut before each space that
stands between visible ASCII letters: no word of these tokenizers goes on behind a visible letter over a space.
The pieces with other letters then go to the library (without offsets, which cost it half as much again).
`quick_words` gives None for every tokenizer that does anything beyond the three steps (dropout, a normalizer other than
NFC, added tokens that strip), and where its ids differ from the library's on a text of all short sequences of kinds of
letters. The library's own `encode` stays the plain twin; tests hold the two equal.

Characters of tokens: a byte-level token is its bytes, so ranges are sums of lengths; that the bytes of all tokens make
the whole text is asked of every text. Leaves out: SentencePiece kinds (Metaspace, Unigram), WordPiece.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CLASSES = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "Lt": "", "Lm": "", "Lo": "", "M": "", "N": "0-9", "Nd": "0-9"}
_CLASS = rf"\\p\{{(?:{'|'.join(_CLASSES)})\}}"
_KNOWN = re.compile(rf"(?:{_CLASS}|\\[sSrnt]|\(\?(?:i?:|!)|[ \[\]^|+*?(){{}},.'/\-0-9A-Za-z])+")
_PROBES = (("aZ7 \n\r\t'.s_<\x1cé中", 3), ("a7 \n.'’", 4))  # letters, and how many of them in a row
_MOST_WORDS = 1 << 18  # the table is begun anew above; about 50 MB
_MOST_PIECES, _LONGEST_PIECE = 1 << 16, 48
Found = tuple[np.ndarray, np.ndarray, np.ndarray, bool]
_NOWHERE = r"[^\x00-\x7f]"
_BORDER = re.compile(r"(?<=[!-~])(?= [!-~])")


class Uncovered(Exception):
    """A word whose bytes the vocabulary does not cover: the plain way says what is wrong."""


class _Table(dict[str, bytes]):
    """Word -> ids (as the bytes of int64, which join without a look at each), filled by the tokenizer's own model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def __missing__(self, word: str) -> bytes:
        shown = word.translate(_SHOWN)
        tokens = self.model.tokenize(shown)
        if "".join(token.value for token in tokens) != shown:
            raise Uncovered(word)
        if len(self) >= _MOST_WORDS:
            self.clear()
        self[word] = ids = _packed(token.id for token in tokens)
        return ids


@dataclass
class QuickWords:
    """Tokenises texts with one tokenizer. `encode` is pure; the table only grows."""

    backend: Tokenizer
    split: re.Pattern[str]
    markers: tuple[re.Pattern[str], ...]  # added tokens, in the order in which the library looks for them
    added: dict[str, bytes]  # each added token as its one id
    composes: bool  # the tokenizer brings texts to NFC first
    lengths: np.ndarray  # bytes of each token of the vocabulary, -1 = not a byte-level token
    table: _Table = field(init=False)
    pieces: dict[str, bytes] = field(default_factory=dict)  # short sections, and pieces of other letters

    def __post_init__(self) -> None:
        self.table = _Table(self.backend.model)

    def encode(self, text: str) -> Found | None:
        """ids_T, start_T, end_T of the text, and whether every token begins where the one before ends.

        None where only the plain way can tell.
        """
        if self.composes and not text.isascii() and not _composed(text):
            return None  # as a whole: a mark behind an added token may take its last letter from it
        try:
            parts: list[bytes] = []
            for number, section in enumerate(self._sections(text)):
                if number % 2:
                    parts.append(self.added[section])
                elif (known := self.pieces.get(section)) is not None:
                    parts.append(known)
                elif section:
                    self._words(section, parts)
        except Uncovered:
            return None
        ids_T = np.frombuffer(b"".join(parts), dtype=np.int64)
        if not len(ids_T):
            return None if text else (ids_T, ids_T, ids_T, False)
        size_T = self.lengths[ids_T]
        end_T = np.cumsum(size_T)
        if (least := int(size_T.min())) < 0:
            return None
        start_T = end_T - size_T
        if text.isascii():
            return (ids_T, start_T, end_T, least > 0) if end_T[-1] == len(text) else None
        return self._characters(text, ids_T, start_T, end_T)

    def _sections(self, text: str) -> list[str]:
        """Text and added token in turn, text first and last."""
        found = self.markers[0].split(text)
        for pattern in self.markers[1:]:
            found = [
                part
                for number, section in enumerate(found)
                for part in ([section] if number % 2 else pattern.split(section))
            ]
        return found

    def _words(self, section: str, parts: list[bytes]) -> None:
        """The ids of a text without added tokens, at the end of `parts`."""
        if section.isascii():
            words = self.split.findall(section)
            if "".join(words) != section:
                raise Uncovered(section)
            found = b"".join(map(self.table.__getitem__, words))
            parts.append(self._kept(section, found) if len(section) <= _LONGEST_PIECE else found)
            return
        plain = ""
        for piece in _BORDER.split(section):
            if piece.isascii():
                plain += piece
                continue
            if plain:
                self._words(plain, parts)
                plain = ""
            parts.append(self._piece(piece))
        if plain:
            self._words(plain, parts)

    def _piece(self, piece: str) -> bytes:
        found = self.pieces.get(piece)
        if found is None:
            found = _packed(self.backend.encode_batch_fast([piece], add_special_tokens=False)[0].ids)
        return self._kept(piece, found) if len(piece) <= _LONGEST_PIECE else found

    def _kept(self, piece: str, ids: bytes) -> bytes:
        if len(self.pieces) >= _MOST_PIECES:
            self.pieces.clear()
        self.pieces[piece] = ids
        return ids

    def _characters(self, text: str, ids_T: np.ndarray, start_T: np.ndarray, end_T: np.ndarray) -> Found | None:
        """Ranges of bytes to ranges of characters: a token that holds a part of one counts with all of it."""
        data = text.encode()
        if end_T[-1] != len(data) or not start_T.size:
            return None
        first = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
        character = np.cumsum(first) - 1  # of each byte
        return ids_T, character[start_T], character[end_T - 1] + 1, False


def quick_words(tokenizer: Any) -> QuickWords | None:
    """The quick way for a transformers tokenizer, or None where the library's own way is the only sure one."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    split = _split_of(backend)
    added = tokenizer.added_tokens_decoder
    if split is None or any(token.lstrip or token.rstrip or token.single_word for token in added.values()):
        return None
    markers = tuple(
        re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})")
        for normalized in (False, True)
        if (names := [str(token.content) for token in added.values() if token.normalized is normalized])
    )
    known = {str(token.content): int(index) for index, token in added.items()}
    if any(not name for name in known):
        return None
    ids = {text: _packed([index]) for text, index in known.items()}
    never = (re.compile(r"((?!))"),)
    made = QuickWords(
        backend, split, markers or never, ids, backend.normalizer is not None, _lengths(backend, known)
    )  # fmt: skip
    return made if _agrees(made) else None


def _split_of(backend: Tokenizer) -> re.Pattern[str] | None:
    """The expression that cuts words, in Python's words for ASCII; None where the tokenizer does more than cut."""
    model = backend.model
    if not isinstance(backend.normalizer, NFC | None) or not isinstance(model, BPE) or model.dropout:
        return None
    if model.unk_token or model.byte_fallback or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if backend.pre_tokenizer is None:
        return None
    described = json.loads(_described(backend))
    steps = described.get("pretokenizers") if described["type"] == "Sequence" else [described]
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    own = steps[-1].get("use_regex", True)
    if len(steps) == 1 and own:
        return translated(_GPT2)
    if len(steps) != 2 or own or steps[0].get("type") != "Split":
        return None
    if steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        return None
    pattern = steps[0]["pattern"].get("Regex")
    return None if pattern is None else translated(pattern)


def _described(backend: Tokenizer) -> str:
    """The step that cuts words, as JSON."""
    state: bytes = backend.pre_tokenizer.__getstate__()
    return state.decode()


def translated(pattern: str) -> re.Pattern[str] | None:
    """An expression of the library for Python, exact on ASCII text; None where it holds what is not known here."""
    if not _KNOWN.fullmatch(pattern):
        return None
    out: list[str] = []
    inside = False
    for piece in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if piece in "[]":
            inside = piece == "["
        if not piece.startswith(r"\p"):
            out.append(piece)
            continue
        letters = _CLASSES[piece[3:-1]]
        out.append(letters if inside else f"[{letters}]" if letters else _NOWHERE)
    try:
        made = re.compile("".join(out).replace("[^]", r"[\x00-\x7f]").replace("[]", _NOWHERE), re.ASCII)
    except re.error:
        return None
    return None if made.groups else made


def _lengths(backend: Tokenizer, added: dict[str, int]) -> np.ndarray:
    vocabulary = backend.get_vocab(with_added_tokens=False)
    size = 1 + max(itertools.chain(vocabulary.values(), added.values()), default=0)
    lengths = np.full(size, -1, dtype=np.int64)
    for token, index in vocabulary.items():
        lengths[index] = len(token)  # one letter for each byte
    for text, index in added.items():
        lengths[index] = len(text.encode())
    return lengths


def _agrees(made: QuickWords) -> bool:
    """Equal words and ids on every short sequence of kinds of letters (that the vocabulary has), and around tokens."""
    have = tuple("".join(one for one in letters if made.encode(one) is not None) for letters, _ in _PROBES)
    if not _cuts_alike(_described(made.backend), made.split, have):
        return False
    text = _probe(have) + "é\u2028 中".join(made.added)
    found = made.encode(text)
    return found is not None and found[0].tolist() == made.backend.encode(text, add_special_tokens=False).ids


def _probe(letters: tuple[str, ...]) -> str:
    """Every sequence of so many of the letters."""
    sizes = [number for _, number in _PROBES]
    return "".join(
        "".join(sequence)
        for some, number in zip(letters, sizes, strict=True)
        for sequence in itertools.product(some, repeat=number)
    )


@cache
def _cuts_alike(described: str, split: re.Pattern[str], letters: tuple[str, ...]) -> bool:
    """The same words, whatever is merged in them."""
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    cut = Tokenizer.from_str(json.dumps({**empty, "pre_tokenizer": json.loads(described)})).pre_tokenizer
    text = _probe(letters)
    ours: list[str] = []
    for piece in _BORDER.split(text):
        found = cut.pre_tokenize_str(piece) if not piece.isascii() else []
        ours += [piece[a:b] for _, (a, b) in found] or split.findall(piece)
    return ours == [text[a:b] for _, (a, b) in cut.pre_tokenize_str(text)]


def _composed(text: str) -> bool:
    """NFC already, by any version of Unicode: letters beyond the basic plane count only among emoji."""
    return unicodedata.is_normalized("NFC", text) and all(c < "\U00010000" or c >= "\U0001f000" for c in set(text))


def _packed(ids: Iterable[int]) -> bytes:
    return array("q", ids).tobytes()


def _shown() -> dict[int, str]:
    """Each byte as the visible letter that byte-level tokenizers write it with (GPT-2's table)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest: Iterable[int] = (byte for byte in range(256) if byte not in set(seen))
    return {**{byte: chr(byte) for byte in seen}, **{byte: chr(256 + n) for n, byte in enumerate(rest)}}


_SHOWN = _shown()
