"""DiReFT: h + R'(W h + b) on the residual stream at a prompt's first and last tokens; LoReFT without the "- R h".

The edit adds to the subspace of R instead of setting it, so one product less and no need for R to be orthonormal;
pyreft keeps it orthonormal (`variant: direft`), the paper's formula has a free matrix there (`nodireft`), and lobireft
adds one learnt vector R'b to every edited row. arXiv:2404.03592, section 3.2: cheaper than LoReFT, a little behind it.
Everything else (places, fields, files, what it cannot do) is LoReFT's: methods/loreft.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from luthier.methods.loreft import LoReFT


@dataclass(frozen=True, kw_only=True)
class DiReFT(LoReFT):
    """Add a low-rank edit to the hidden states of a few prompt tokens: LoReFT's cheaper relative."""

    variants: ClassVar[tuple[str, ...]] = ("direft", "nodireft", "lobireft")

    variant: Literal["direft", "nodireft", "lobireft"] = field(  # type: ignore[assignment]
        default="direft", metadata={"doc": "nodireft: R need not be orthonormal; lobireft: one vector for all rows"}
    )
