"""MinHash: a small sketch of a set from which overlap is guessed, and rows that may be near are brought together.

    signature    h hashes; of each the smallest over the set. Two sets agree in one with chance J (Broder 1997)
    bands        the signature in b bands of r; rows that agree in a whole band are looked at: with J once in
                 1 - (1 - J^r)^b   (Indyk & Motwani 1998). Of 128 hashes, r is the largest that misses a pair that lies
                 just at the threshold at most once in a thousand: 32 x 4 at 0.7, 25 x 5 at 0.8, 16 x 8 at 0.9.
                 So bands bring up too many rather than too few; what is near is decided on the sets themselves.
    bits         the lowest bit of each hash (b-bit minwise hashing, Li & König 2010): two rows agree in (1 + J) / 2 of
                 them, so most pairs that are not near are told apart by 16 bytes, before any row is read again.

The signature is rensa's (Rust; MIT). Its hashes depend on the fixed seed alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from luthier.data.shingles import mixed

HASHES = 128
_SEED = 1
_MISSED = 1e-3  # of pairs that lie just at the threshold
_DEVIATIONS = 5.0  # how far below what is expected the bits of a pair may lie: once in three million
_ONES = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)


def banding(threshold: float) -> tuple[int, int]:
    """(bands, hashes in each) for a threshold."""
    for r in range(HASHES, 1, -1):
        if (1 - threshold**r) ** (HASHES // r) <= _MISSED:
            return HASHES // r, r
    return HASHES, 1


def signatures(numbers: NDArray[Any], starts: NDArray[Any]) -> NDArray[Any]:
    """Signature of each set of `shingles.hashed`: uint32, B x 128. An empty set has some row that means nothing."""
    if len(starts) == 1:
        return np.zeros((0, HASHES), np.uint32)
    made = RMinHash.digest_matrix_from_flat_token_hashes(numbers, starts, HASHES, _SEED)
    return np.array(made.to_rows(), dtype=np.uint32)


def band_keys(signatures_BH: NDArray[Any], bands: int, each: int) -> NDArray[Any]:
    """One 32-bit number a band; rows that agree by chance are told apart later."""
    parts = signatures_BH[:, : bands * each].reshape(-1, bands, each).astype(np.uint64)
    keys = np.full(parts.shape[:2], 1, np.uint64)
    for k in range(each):
        keys = mixed(keys * np.uint64(31) + parts[:, :, k])
    return (keys >> np.uint64(32)).astype(np.uint32)


def low_bits(signatures_BH: NDArray[Any]) -> NDArray[Any]:
    """The lowest bit of each hash: uint8, B x 16."""
    return np.packbits((signatures_BH & 1).astype(np.uint8), axis=1)


def agreeing(bits_P: NDArray[Any], others_P: NDArray[Any]) -> NDArray[Any]:
    """In how many of the 128 bits two rows agree."""
    return HASHES - _ONES[bits_P ^ others_P].sum(axis=1, dtype=np.int64)


def least_agreeing(threshold: float) -> int:
    """Fewer bits in common than this, and two rows are not near."""
    chance = (1 + threshold) / 2
    return math.floor(HASHES * chance - _DEVIATIONS * math.sqrt(HASHES * chance * (1 - chance)))
