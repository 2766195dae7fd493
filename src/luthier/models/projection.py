"""Gradients in a low-rank subspace of their own: GaLore's projection (arXiv:2403.03507), as pure functions.

    right    Q = first R rows of V^T  (R, n)      low = G Q^T    (m, R)      back = low Q
    left     P = first R columns of U (m, R)      low = P^T G    (R, n)      back = P low
    full     both                                 low = P^T G Q^T (R, R)     back = P low Q

with G = U S V^T, G (m, n). `std` takes the side that makes the smaller moments (right where m >= n), `reverse_std` the
other. A rank above the smaller side of a matrix is that side: the gradient is turned whole. The sign and order of
singular vectors are LAPACK's; nothing depends on them but rounding. Who steps with it is engine/projected.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = ("std", "reverse_std", "right", "left", "full")


@dataclass(frozen=True, slots=True)
class Projection:
    """The settings of a group: a new subspace every `update_proj_gap` steps, the update times `scale`."""

    rank: int
    update_proj_gap: int
    scale: float
    proj_type: str

    def side(self, shape: Any) -> str:
        """`right`, `left` or `full`, for a matrix of that shape."""
        if self.proj_type in ("right", "left", "full"):
            return self.proj_type
        tall = shape[0] >= shape[1]
        return "right" if tall == (self.proj_type == "std") else "left"

    def slots(self, shape: Any) -> dict[str, tuple[int, int]]:
        """Name -> shape of all that an optimizer keeps for a matrix: both moments and the subspace."""
        rows, columns = shape
        rank, side = min(self.rank, rows, columns), self.side(shape)
        low = {"right": (rows, rank), "left": (rank, columns), "full": (rank, rank)}[side]
        found = {"exp_avg": low, "exp_avg_sq": low}
        if side != "left":
            found["right"] = (rank, columns)
        if side != "right":
            found["left"] = (rows, rank)
        return found

    def elements(self, shape: Any) -> int:
        """Of all slots."""
        return sum(rows * columns for rows, columns in self.slots(shape).values())

    def subspace(self, grad_OI: Tensor) -> dict[str, Tensor]:
        """The slots `left` and `right` that this gradient spans, in its own type."""
        side = self.side(grad_OI.shape)
        u_OK, _, v_KI = torch.linalg.svd(grad_OI.float(), full_matrices=False)
        found = {}
        if side != "left":
            found["right"] = v_KI[: self.rank].to(grad_OI.dtype).contiguous()
        if side != "right":
            found["left"] = u_OK[:, : self.rank].to(grad_OI.dtype).contiguous()
        return found


def project(grad_OI: Tensor, basis: dict[str, Tensor]) -> Tensor:
    """Into the subspace; `basis` as `Projection.subspace` gives it."""
    low = basis["left"].T @ grad_OI if "left" in basis else grad_OI
    return low @ basis["right"].T if "right" in basis else low


def project_back(low: Tensor, basis: dict[str, Tensor]) -> Tensor:
    """(m, n) again: `project(project_back(x)) == x`, since the bases are orthonormal."""
    back = basis["left"] @ low if "left" in basis else low
    return back @ basis["right"] if "right" in basis else back
