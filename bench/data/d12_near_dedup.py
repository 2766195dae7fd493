"""D12: near duplicates, end to end with shingling, beside datasketch and rensa; truth is the overlap of all pairs.

Truth: every pair that shares a shingle, by the plain sets (`shingles`), threshold 0.7 and 0.8. Recall is the share of
true pairs that stand in one group; precision the share of verified pairs that are true, 1 by construction and checked
here. The rivals shingle the same words in Python, as their documentation does, and stop at candidates: they verify
nothing, so their precision is that of the sketch. Memory is measured in a process of its own (`bench.data.million`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.data import Figure
from bench.data.worded import Worded, seconds
from luthier.contracts.step import Item, Room
from luthier.data.applied import batches
from luthier.data.near import Search, Sets
from luthier.data.shingles import Shingler, words
from luthier.data.shingles import shingles as plain_shingles
from luthier.data.steps.near_dedup import NearDedup

GOALS = ("D12",)
_N = 5


def measure(quick: bool) -> list[Figure]:
    figures = [_quality(300 if quick else 6000, threshold) for threshold in (0.7, 0.8)]
    figures += _rates(300 if quick else 8000, quick)
    return [*figures, _memory(2000 if quick else 1_000_000)]


def _quality(count: int, threshold: float) -> Figure:
    rows = [Worded(count, 600)[i] for i in range(count)]
    truth = true_pairs([str(item.record.text) for item in rows], threshold)  # type: ignore[union-attr]
    search = _search(rows, threshold)
    labels = search.groups()
    recalled = sum(labels[i] == labels[j] for i, j in truth) / len(truth)
    false = _joined_falsely(labels.tolist(), truth)
    theirs = _datasketch_pairs(rows, threshold)
    rival = "datasketch is not installed"
    if theirs is not None:
        hits = len(theirs & truth)
        rival = f"datasketch: recall {hits / len(truth):.4f}, precision {hits / max(1, len(theirs)):.4f}"
    return Figure(
        "D12", f"near duplicates at {threshold}", f"recall {recalled:.4f}, {false} rows joined falsely", rival,
        "recall >= 0.99, precision 1", recalled >= 0.99 and false == 0,
        f"{count:,} made rows of 600 characters, {len(truth):,} true pairs of 5-word shingles",
    )  # fmt: skip


def _search(rows: Sequence[Item], threshold: float) -> Search:
    step, room, shingler = NearDedup(threshold=threshold, n=_N), Room(Path()), Shingler(_N)
    sketcher = step.sketch(room)
    sketches = np.concatenate([sketcher(batch) for batch in batches(rows)])
    read = lambda some: shingler.hashed([rows[i].record.text for i in some])  # type: ignore[union-attr]
    return Search(sketches, threshold, Sets(read))


def true_pairs(texts: Sequence[str], threshold: float) -> set[tuple[int, int]]:
    """All near pairs, by an index of who holds which shingle: exact, and no pair without a common one can be near."""
    holders: dict[Any, list[int]] = defaultdict(list)
    sets, pairs = [], set()
    for j, text in enumerate(texts):
        mine = plain_shingles(text, _N)
        common = Counter(i for shingle in mine for i in holders[shingle])
        pairs |= {(i, j) for i, both in common.items() if both / (len(sets[i]) + len(mine) - both) >= threshold}
        for shingle in mine:
            holders[shingle].append(j)
        sets.append(mine)
    return pairs


def _joined_falsely(labels: list[int], truth: set[tuple[int, int]]) -> int:
    """Rows that stand in a group to which no true pair ties them."""
    near: dict[int, set[int]] = defaultdict(set)
    for i, j in truth:
        near[i].add(j)
        near[j].add(i)
    return sum(row != first and not any(labels[other] == first for other in near[row])
               for row, first in enumerate(labels))  # fmt: skip


def _rates(count: int, quick: bool) -> list[Figure]:
    rows = [Worded(count, 600)[i] for i in range(count)]
    ours, theirs, rensa = seconds(
        1 if quick else 2, lambda: _step(rows), lambda: _datasketch_pairs(rows, 0.8), lambda: _rensa(rows)
    )
    rate = count / ours
    made = "CPU time, end to end with shingling, best of 2 in turn, rows of 600 characters"
    if _datasketch_pairs(rows[:2], 0.8) is None:
        return [Figure("D12", "near duplicates, rate", f"{rate:,.0f} rows/s", "datasketch is not installed",
                       ">= 8,000 rows/s and >= 5 x datasketch", False, made)]  # fmt: skip
    rival = count / theirs
    return [
        Figure("D12", "near duplicates, rate", f"{rate:,.0f} rows/s", f"datasketch: {rival:,.0f} rows/s",
               ">= 8,000 rows/s and >= 5 x datasketch", rate >= 8000 and rate >= 5 * rival,
               f"{made}: {count:,}"),
        Figure("D12", "near duplicates, rate beside rensa", f"{rate:,.0f} rows/s, verified",
               f"rensa: {count / rensa:,.0f} rows/s, not verified", "no bar", True, f"{made}: {count:,}"),
    ]  # fmt: skip


def _step(rows: Sequence[Item]) -> int:
    step, room = NearDedup(), Room(Path())
    sketcher = step.sketch(room)
    sketches = np.concatenate([sketcher(batch) for batch in batches(rows)])
    return int(step.decide(sketches, rows, room).copies_B.sum())


def _shingled(item: Item) -> set[str]:
    said = words(item.record.text)  # type: ignore[union-attr]
    return {" ".join(said[i : i + _N]) for i in range(max(1, len(said) - _N + 1))}


def _datasketch_pairs(rows: Sequence[Item], threshold: float) -> set[tuple[int, int]] | None:
    """Pairs that datasketch brings up: 128 hashes, its own choice of bands."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        return None
    index, pairs = MinHashLSH(threshold=threshold, num_perm=128), set()
    for j, item in enumerate(rows):
        signed = MinHash(num_perm=128, seed=1)
        signed.update_batch([shingle.encode() for shingle in _shingled(item)])
        pairs |= {(i, j) for i in index.query(signed)}
        index.insert(j, signed, check_duplication=False)
    return pairs


def _rensa(rows: Sequence[Item]) -> int:
    """Flags of rensa over the same shingles: its whole matrix at once, 32 bands."""
    from rensa import RMinHash, RMinHashLSH

    matrix = RMinHash.digest_matrix_from_token_sets([list(_shingled(item)) for item in rows], 128, 1)
    index = RMinHashLSH(threshold=0.8, num_perm=128, num_bands=32)
    return sum(index.query_duplicate_flags_matrix_one_shot(matrix))


def _memory(count: int) -> Figure:
    ran = subprocess.run([sys.executable, "-m", "bench.data.million", str(count)], capture_output=True, text=True,
                         check=True)  # fmt: skip
    made = json.loads(ran.stdout.splitlines()[-1])
    gigabytes = made["peak_bytes"] / 1e9
    total = made["sketched_s"] + made["decided_s"]
    return Figure(
        "D12", f"near duplicates, memory of {count:,} rows", f"{gigabytes:.2f} GB peak, {count / total:,.0f} rows/s",
        "-", "< 2 GB", gigabytes < 2,
        f"rows of 600 characters made when read (which counts where they are read again), {made['kept']:,} stay, "
        f"{made['bytes_a_row']} bytes of sketch a row on disk",
    )  # fmt: skip
