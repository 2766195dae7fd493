"""How widely the topics of some texts spread: clusters of their embeddings, and how evenly the texts fill them.

    clusters k = min(32, n / 8), spherical k-means (Dhillon and Modha, 2001) from a farthest-first start
    spread   = exp(-sum p_i ln p_i)      the number of equally filled clusters with the same entropy, between 1 and k

`spread / k` near 1 says that no topic rules; far below, that most texts sit in a few clusters. The embedder is given:
texts -> one unit vector each. Leaves out names for the clusters: the rows nearest to each centre are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Embed = Callable[[Sequence[str]], NDArray[Any]]
MOST, LEAST_TEXTS, ROUNDS = 32, 16, 25


def effective(counts: Sequence[float]) -> float:
    """exp of the entropy: how many equal parts would be as even (Hill number of order 1)."""
    total = sum(counts)
    return math.exp(-sum(c / total * math.log(c / total) for c in counts if c)) if total else 0.0


def spread(texts: Sequence[str], embed: Embed) -> dict[str, Any] | None:
    """Figures of the topics, None of too few texts."""
    if len(texts) < LEAST_TEXTS:
        return None
    vectors_BD = np.asarray(embed(texts), dtype=np.float64)
    lengths_B1 = np.linalg.norm(vectors_BD, axis=1, keepdims=True)
    vectors_BD = vectors_BD / np.maximum(lengths_B1, 1e-12)
    k = min(MOST, len(texts) // 8)
    sizes = np.bincount(clustered(vectors_BD, k), minlength=k)
    return {
        "clusters": k,
        "effective": round(effective(sizes.tolist()), 2),
        "largest": round(max(sizes) / len(texts), 4),
    }


def clustered(vectors_BD: NDArray[Any], k: int) -> NDArray[Any]:
    """The cluster of each unit vector. No chance in it: the start is farthest-first from the one nearest the mean."""
    centres_KD = vectors_BD[_farthest_first(vectors_BD, k)]
    belongs_B = np.zeros(len(vectors_BD), dtype=np.int64)
    for _ in range(ROUNDS):
        now_B = np.argmax(np.round(vectors_BD @ centres_KD.T, 9), axis=1)
        if (now_B == belongs_B).all() and _:
            break
        belongs_B = now_B
        for cluster in range(k):
            members_MD = vectors_BD[belongs_B == cluster]
            total_D = members_MD.sum(axis=0)
            if len(members_MD) and np.linalg.norm(total_D) > 0:
                centres_KD[cluster] = total_D / np.linalg.norm(total_D)
    return belongs_B


def _farthest_first(vectors_BD: NDArray[Any], k: int) -> list[int]:
    chosen = [int(np.argmax(np.round(vectors_BD @ vectors_BD.mean(axis=0), 9)))]
    nearest_B = vectors_BD @ vectors_BD[chosen[0]]
    while len(chosen) < k:
        chosen.append(int(np.argmin(np.round(nearest_B, 9))))
        nearest_B = np.maximum(nearest_B, vectors_BD @ vectors_BD[chosen[-1]])
    return chosen
