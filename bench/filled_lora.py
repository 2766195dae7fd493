"""LoRA whose factors start as bench/work.py fills them, so that every system starts from the same adapter.

A guest method by dotted path (`method: {name: bench.filled_lora.FilledLoRA}`): nothing of Luthier is patched.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bench.work import fill_adapter
from luthier.methods.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class FilledLoRA(LoRA):
    """LoRA, filled by name."""

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        named = {name: tensor.clone() for name, tensor in self.tensors(model).items()}
        fill_adapter(named)
        self.load(model, named)
