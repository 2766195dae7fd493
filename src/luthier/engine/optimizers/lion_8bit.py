"""Lion with its average in 8 bits: one byte of state for each weight.

The average in the signed dynamic map, blocks of 256; tensors of fewer than 4,096 elements, embeddings and the head keep
32 bits. bitsandbytes' Lion8bit is what tests hold it to; what is said in adamw_8bit.py of codes holds here too.
"""

from __future__ import annotations

from typing import ClassVar

from luthier.engine.optimizers.lion import Lion


class Lion8bit(Lion):
    eight_bits: ClassVar[bool] = True
