"""When two texts are the same words, and 128 bits that say so: what duplicates and choices by hash stand on.

NFKC, case folded, white space collapsed. The digest is BLAKE2b: the same on every machine, unlike Python's hash, and
two different texts among 10^9 agree with a chance below 10^-20.
"""

from __future__ import annotations

import unicodedata
from hashlib import blake2b

BYTES = 16


def normalised(text: str) -> str:
    """NFKC, case folded, white space collapsed. Plain ASCII, most of all text, needs no NFKC."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def digest_of(text: str) -> bytes:
    """128 bits of the text as it is; lone surrogates too."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=BYTES).digest()
