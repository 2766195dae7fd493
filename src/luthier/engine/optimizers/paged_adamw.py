"""AdamW whose averages may leave a full GPU: pages of them move to the host and come back for the step.

The same numbers as `adamw`. Where memory suffices nothing moves; where it does not, a step becomes slow in place of
failing. Worth it for spikes of activations beside large averages; a LoRA's averages are too small to matter.
bitsandbytes gives the memory. On a CPU it is `adamw`, and a note says so.
"""

from __future__ import annotations

from luthier.engine.optimizers._managed import Managed
from luthier.engine.optimizers.adamw import AdamW


class PagedAdamW(Managed, AdamW):
    pass
