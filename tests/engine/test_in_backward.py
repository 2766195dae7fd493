"""The optimizer's step inside backward: the same weights as after it, from a fraction of the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import rig
from luthier.contracts.batch import Batch
from luthier.contracts.errors import RecipeError, ResourceError
from luthier.contracts.event import StepDone, StepSkipped
from luthier.contracts.method import Method
from luthier.engine import checkpoint
from luthier.engine.strategy.in_backward import check_in_backward
from luthier.methods.full import Full

OPTIONS: dict[str, Any] = {
    "method": "full", "max_grad_norm": 0.0, "learning_rate": 1e-3, "evaluation": 0, "microbatch_tokens": None,
}  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@contextmanager
def alive(model: nn.Module) -> Iterator[list[int]]:
    """Bytes of gradients that exist whenever one more has become whole, before anybody frees it."""
    seen: list[int] = []

    def count(_: Tensor) -> None:
        seen.append(sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None))

    hooks = [p.register_post_accumulate_grad_hook(count) for p in model.parameters()]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("family", "microbatch_tokens"), [("llama", None), ("llama", 60), ("gpt2", None)])
def test_the_weights_are_those_of_the_plain_way(tmp_path: Path, family: str, microbatch_tokens: int | None) -> None:
    """Eight steps; gpt2's head and embedding are one tensor, whose gradient is whole only at the end.

    To 3e-6, and to 1e-5 where the gradient is nothing but rounding, which AdamW divides by its own size: a bias of
    the keys moves no softmax, and the plain way sums in another order (models/gradient_room.py).
    """
    ends, told = [], []
    for on in (False, True):
        run = rig.build(tmp_path / str(on), steps=8, in_backward=on, family=family,
                        **{**OPTIONS, "microbatch_tokens": microbatch_tokens})  # fmt: skip
        told.append([(e.loss, e.grad_norm) for e in rig.train(run) if isinstance(e, StepDone)])
        ends.append(weights(run.trunk.model))
    start = weights(rig.tiny(family))
    for name, tensor in ends[0].items():
        limit = 1e-5 if name.endswith("c_attn.bias") else 3e-6
        assert (tensor - ends[1][name]).abs().max() < limit, name
    assert max(float((ends[0][name] - start[name]).abs().max()) for name in start) > 1e-3
    for one, two in zip(*told, strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_few_gradients_exist_at_once(tmp_path: Path) -> None:
    peaks = {}
    for on in (False, True):
        run = rig.build(tmp_path / str(on), steps=1, in_backward=on, **OPTIONS)
        with alive(run.trunk.model) as seen:
            list(rig.train(run))
        peaks[on] = max(seen)
    sizes = [4 * p.numel() for p in run.trunk.model.parameters()]
    assert peaks[False] == sum(sizes)
    assert peaks[True] <= sum(sorted(sizes)[-2:])
    assert peaks[True] < peaks[False] / 2
    assert not any(p._post_accumulate_grad_hooks for p in run.trunk.model.parameters())


def test_checkpoints_are_the_plain_ones_and_resume_bit_equal(tmp_path: Path) -> None:
    options = {**OPTIONS, "in_backward": True}
    rig.run_through(tmp_path / "whole", **options)
    for event in rig.train(rig.build(tmp_path / "broken", **options)):
        if event.event == "step" and event.step == 8:
            break
    rig.run_through(tmp_path / "broken", resume="auto", **options)
    assert rig.final_digests(tmp_path / "broken") == rig.final_digests(tmp_path / "whole")
    rig.run_through(tmp_path / "plain", **OPTIONS)
    names = [set(checkpoint.load(tmp_path / name / "checkpoint-12").optimizer) for name in ("whole", "plain")]
    assert names[0] == names[1]


def spoil(run: rig.Run, step: int, *, gradient: bool) -> None:
    inner, wanted = run.trunk.logprobs, run.stream.step(step - 1)[0].samples

    def logprobs(batch: Batch, coefficients_N: Tensor | None = None) -> Tensor:
        found = inner(batch, coefficients_N)
        if batch.samples != wanted:
            return found
        if not gradient:
            return found * float("nan")
        found.register_hook(lambda grad: grad * float("inf"))
        return found

    run.trunk.logprobs = logprobs  # type: ignore[method-assign]


def test_a_non_finite_loss_changes_nothing(tmp_path: Path) -> None:
    run = rig.build(tmp_path, steps=3, in_backward=True, **OPTIONS)
    spoil(run, 2, gradient=False)
    seen = [(e.event, weights(run.trunk.model)) for e in rig.train(run) if e.event in ("step", "skip")]
    assert [kind for kind, _ in seen] == ["step", "skip", "step"]
    assert all(torch.equal(seen[0][1][name], seen[1][1][name]) for name in seen[0][1])


def test_a_non_finite_gradient_never_reaches_the_weights(tmp_path: Path) -> None:
    run = rig.build(tmp_path, steps=3, in_backward=True, **OPTIONS)
    spoil(run, 2, gradient=True)
    skipped = [event for event in rig.train(run) if isinstance(event, StepSkipped)]
    assert [event.step for event in skipped] == [2]
    assert "gradient norm" in skipped[0].reason
    assert all(torch.isfinite(p).all() for p in run.trunk.model.parameters())


def test_a_gradient_that_overflows_on_its_way_down_is_told_with_what_moved(tmp_path: Path) -> None:
    run = rig.build(tmp_path, steps=2, in_backward=True, **OPTIONS)
    layer = run.trunk.model.model.layers[0]
    before = weights(run.trunk.model)
    layer.mlp.down_proj.register_full_backward_hook(
        lambda *_: (torch.full((1, 1, 1), float("nan")).expand_as(_[1][0]),)
    )
    (skipped, _) = [event for event in rig.train(run) if isinstance(event, StepSkipped)]
    assert "were updated before it showed" in skipped.reason
    after = weights(run.trunk.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "lm_head.weight" in moved
    assert "model.layers.0.mlp.gate_proj.weight" not in moved
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


def test_memory_that_runs_out_in_the_middle_is_the_end(tmp_path: Path) -> None:
    """The step cannot be done again in smaller parts: some of it is done."""
    run = rig.build(tmp_path, steps=2, in_backward=True, **OPTIONS)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("made up")

    run.trunk.model.model.layers[0].register_full_backward_hook(fail)
    with pytest.raises(ResourceError, match="middle of an update"):
        list(rig.train(run))


def test_what_needs_all_gradients_is_refused(tmp_path: Path) -> None:
    class Reads(Method):
        def after_step(self, model: nn.Module, step: int, steps: int) -> None: ...

    with pytest.raises(RecipeError, match=r"train\.max_grad_norm.*set it to 0"):
        rig.run_through(tmp_path, in_backward=True, method="full")
    with pytest.raises(RecipeError, match="reads gradients"):
        check_in_backward(Reads(), 0.0)
    check_in_backward(Full(), 0.0)
