"""AdamW with averages in 8 bits that may leave a full GPU: `adamw_8bit` in CUDA's managed memory.

The same numbers as `adamw_8bit`; what is said in paged_adamw.py holds here too. On a CPU it is `adamw_8bit`.
"""

from __future__ import annotations

from luthier.engine.optimizers._managed import Managed
from luthier.engine.optimizers.adamw_8bit import AdamW8bit


class PagedAdamW8bit(Managed, AdamW8bit):
    pass
