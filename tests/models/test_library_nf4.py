"""bitsandbytes' kernels in the place of torch's: the same numbers, and torch where they are absent or wrong.

The library is no part of the development environment; where it is installed these tests run it on a CPU.
"""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.models.kernels import library_nf4
from luthier.models.quantise import packed
from luthier.models.weights import nf4


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CPU tensors go to the library; what was proven before is forgotten, and again afterwards."""
    monkeypatch.setattr(library_nf4, "TAKES", ("cpu",))
    library_nf4._proven.cache_clear()
    yield monkeypatch
    library_nf4._proven.cache_clear()


def linear(shape: tuple[int, int]) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)


class State(SimpleNamespace):
    def __init__(self, absmax: Tensor, **kwargs: Any) -> None:
        super().__init__(absmax=absmax, **kwargs)


def plain_unpack(codes: Tensor, state: Any) -> Tensor:
    assert state.quant_type == "nf4"
    stored = nf4.NF4(codes.view(-1), state.absmax, tuple(state.shape), state.blocksize)
    return nf4.dequantise_plain(stored, state.dtype)


def plain_scales(codes: Tensor, *, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    return code[codes.long()] * absmax.repeat_interleave(blocksize)[: len(codes)]


def test_a_cpu_keeps_torch() -> None:
    module = packed(linear((48, 64)), "nf4")
    assert not library_nf4.serves(module.matrix(), 64, nf4.CODE)


def test_the_real_library_gives_the_same_numbers(on_cpu: Any) -> None:
    pytest.importorskip("bitsandbytes")
    for shape, double in product([(48, 64), (9, 37), (1, 1), (300, 512)], (True, False)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            on_cpu.setattr(library_nf4, "TAKES", ("cpu",))
            module = packed(linear(shape), "nf4", double=double)
            found = module.matrix(dtype)
            assert library_nf4.serves(found, 64, nf4.CODE) == (found.numel() > 2)
            on_cpu.setattr(library_nf4, "TAKES", ())
            assert torch.equal(found, module.matrix(dtype))


def test_the_call_is_the_one_that_is_meant(on_cpu: Any) -> None:
    """With a stand-in of the same signature: what `fill` hands over, and that it is what comes back."""
    asked: list[str] = []

    def dequantize_4bit(*args: Any, **kwargs: Any) -> Tensor:
        asked.append("codes")
        return plain_unpack(*args, **kwargs)

    def dequantize_blockwise(*args: Any, **kwargs: Any) -> Tensor:
        asked.append("scales")
        return plain_scales(*args, **kwargs)

    library = SimpleNamespace(
        dequantize_4bit=dequantize_4bit, dequantize_blockwise=dequantize_blockwise, QuantState=State
    )
    on_cpu.setattr(library_nf4, "_library", lambda: library)
    on_cpu.setattr(library_nf4, "TAKES", ())
    module = packed(linear((24, 96)), "nf4")
    on_cpu.setattr(library_nf4, "TAKES", ("cpu",))
    found = module.matrix()
    assert asked == ["codes", "scales", "codes"]  # proven once, then used
    assert module.matrix(torch.float64).dtype == torch.float64  # not a dtype of the library's
    assert asked[3:] == ["scales"]
    on_cpu.setattr(library_nf4, "TAKES", ())
    assert torch.equal(found, module.matrix())


def test_a_kernel_that_fails_or_errs_is_not_used(on_cpu: Any) -> None:
    on_cpu.setattr(library_nf4, "TAKES", ())
    module = packed(linear((24, 96)), "nf4")
    expected = module.matrix()
    on_cpu.setattr(library_nf4, "TAKES", ("cpu",))

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    def wrong(codes: Tensor, state: Any) -> Tensor:
        return torch.ones(state.shape, dtype=state.dtype)

    for kernel, says in ((broken, "no kernel image"), (wrong, "its numbers are others")):
        library = SimpleNamespace(dequantize_4bit=kernel, dequantize_blockwise=plain_scales, QuantState=State)
        on_cpu.setattr(library_nf4, "_library", lambda library=library: library)
        library_nf4._proven.cache_clear()
        with pytest.warns(UserWarning, match=says) as seen:
            found = module.matrix()
        assert len(seen) == 1
        on_cpu.setattr(library_nf4, "TAKES", ())
        assert torch.equal(found, expected)
        on_cpu.setattr(library_nf4, "TAKES", ("cpu",))
    on_cpu.setattr(library_nf4, "_library", lambda: None)
    library_nf4._proven.cache_clear()
    assert torch.equal(module.matrix(), found)
