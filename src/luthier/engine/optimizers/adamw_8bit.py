"""AdamW with averages in 8 bits (arXiv:2110.02861): 2.03 bytes of state for each weight in place of 8.

    m in the signed dynamic map, v in the unsigned one, blocks of 256; widen, update in float32, code again

The update is AdamW's, in the order of bitsandbytes' AdamW8bit. Tests hold codes, scales and weights to it: to the bit
with its CPU kernel's look-up of codes, which is coarser than the map near zero; without, codes differ where a number
lies within 2^-16 of the middle of two. Tensors of fewer than 4,096 elements, embeddings and the head keep 32 bits and
are stepped as `adamw` steps them: rare tokens move single rows, which share a scale with rows that rest. With a
projection, the averages in the subspace are kept in 8 bits where they have 4,096 elements. Own code in place of
bitsandbytes: the numbers, and so a checkpoint's, are the same on every device.
"""

from __future__ import annotations

from typing import ClassVar

from luthier.engine.optimizers.adamw import AdamW


class AdamW8bit(AdamW):
    eight_bits: ClassVar[bool] = True
