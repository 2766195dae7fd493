"""What a list of samples is, whatever container, compression or shape its rows were read from.

    sha256 over tokens, weights, forests and numbers of each sample in order; sources and ids are left out

Two files hold the same training rows where this is equal; the fingerprint of a run (prepare.py) is of the files' bytes,
which is what resuming needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from luthier.contracts.record import Sample


def samples_fingerprint(samples: Sequence[Sample]) -> str:
    """Equal for equal samples in equal order."""
    state = hashlib.sha256()
    for sample in samples:
        state.update(repr((sample.sequences, sorted(sample.extra.items()))).encode())
        for piece in sample.pieces:
            tokens_T, weights_T = np.asarray(piece.tokens, np.int64), np.asarray(piece.weights, np.float32)
            state.update(b"%d,%d;" % (piece.parent, len(tokens_T)) + tokens_T.tobytes() + weights_T.tobytes())
    return state.hexdigest()
