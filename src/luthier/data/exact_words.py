"""When two texts are the same words, and 128 bits that say so: what duplicates and choices by hash stand on.

NFKC, case folded, white space collapsed. The digest is BLAKE2b: the same on every machine, unlike Python's hash, and
two different texts among 10^9 agree with a chance below 10^-20.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from hashlib import blake2b

BYTES = 16
_SHORT = 32  # characters of a word that is remembered; longer ones seldom come again
_FOLDED = bytes(32 if chr(i).isspace() and i < 128 else ord(chr(i).lower()) if i < 128 else i for i in range(256))


def digest_of(words: bytes) -> bytes:
    """128 bits."""
    return blake2b(words, digest_size=BYTES).digest()


def normalised(text: str) -> str:
    """NFKC, case folded, white space collapsed: the plain twin of `normalised_bytes`."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def normalised_bytes(text: str) -> bytes:
    """`normalised` in UTF-8, faster: ASCII takes one pass through a table, and NFKC never reaches across white space,
    so of other texts only the words beyond ASCII are put through it, and those that come again are remembered."""
    if not text.isascii():
        text = " ".join([word if word.isascii() else _word(word) for word in text.split()])
    folded = as_it_is(text).translate(_FOLDED)
    return b" ".join(folded.split()) if b"  " in folded else folded.strip(b" ")


def _word(word: str) -> str:
    return _remembered(word) if len(word) <= _SHORT else unicodedata.normalize("NFKC", word).casefold()


@lru_cache(maxsize=1 << 16)
def _remembered(word: str) -> str:
    return unicodedata.normalize("NFKC", word).casefold()


def as_it_is(text: str) -> bytes:
    """UTF-8; lone surrogates are digested as they are."""
    return text.encode("utf-8", "surrogatepass")
