"""What a run does when memory runs out: the same step again in smaller pieces, or one line that says what would help.

    forward, backward, statistics,       nothing has moved: gradients are dropped, microbatches halved, the step is done
    reference, penalty, norm             again; at single rows activations are recomputed, where that may be chosen
    evaluation                           again from its beginning, its own batches halved
    reference scores kept on disk        the batch that did not fit in halves, and those after it no larger
    rows measured before the first step, the run ends in one line: these cannot be cut, and an update is not done
    update of the weights                twice; what was saved before it is whole

Rows of a step and the weight that divides their sum stay, so losses are equal but for rounding, and each attempt starts
from the step's own random numbers. Dropout is drawn microbatch by microbatch: after a halving it falls elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from luthier.contracts.batch import Batch
from luthier.contracts.errors import OutOfMemory
from luthier.data.stream import Stream
from luthier.engine.memory import is_out_of_memory
from luthier.models.recompute import checkpoints_blocks

if TYPE_CHECKING:
    from luthier.engine.work import Work

Found = TypeVar("Found")
_SLACK = 1.1  # packs may be a little larger than asked for
_SHORTER = "lower data.max_tokens, or use a smaller model"


def smaller_step(work: Work, error: Exception, microbatches: Sequence[Batch]) -> str:
    """Halve what is computed at once under the same rows per step; re-raises what is not a lack of memory."""
    if not is_out_of_memory(error):
        raise error
    if work.strategy.half_done:
        raise OutOfMemory(
            "out of memory in the middle of an update, which cannot be done again", where=f"step {work.state.step + 1}",
            remedy="lower train.microbatch_tokens and go on with --resume auto",
        ) from error  # fmt: skip
    work.strategy.zero()
    largest = max(microbatches, key=lambda batch: batch.tokens)
    if fewer := _half(microbatches):
        work.use_microbatches(fewer)
        return (
            f"out of memory at {largest.tokens} tokens: microbatches of {fewer} tokens from here on, same steps "
            "(dropout, where there is any, falls elsewhere)"
        )
    may_recompute = work.run.engine.checkpoint_activations == "auto" and not work.state.recompute
    if may_recompute and checkpoints_blocks(work.model):
        work.use_recompute(True)
        return f"out of memory at one row of {largest.tokens} tokens: activations are recomputed from here on"
    raise _one_row(largest, recompute=work.state.recompute) from error


def smaller_evaluation(stream: Stream, error: Exception) -> tuple[Stream, str]:
    """The same held-out rows in smaller batches; re-raises what is not a lack of memory."""
    if not is_out_of_memory(error):
        raise error
    batches = list(stream.batches())
    largest, fewer = max(batches, key=lambda batch: batch.tokens), _half(batches)
    if not fewer:
        raise _one_row(largest, recompute=False, what=" of the held-out rows") from error
    return stream.with_microbatches(fewer), (
        f"out of memory in evaluation at {largest.tokens} tokens: batches of {fewer} tokens from here on"
    )


def fitting(stream: Stream, do: Callable[[Batch], Found], tell: Callable[[str], None]) -> Iterator[tuple[Batch, Found]]:
    """`do` of every sample of a stream, in its batches, or in smaller ones where memory runs out."""
    samples, most = {sample.id: sample for sample in stream.samples}, 0  # 0: no bound yet
    waiting = [stream.batches()]
    while waiting:
        if (batch := next(waiting[-1], None)) is None:
            waiting.pop()
            continue
        smaller = 0
        if most and batch.tokens > _SLACK * most and len(batch.samples) > 1:
            smaller = most
        else:
            try:
                found = do(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not (smaller := _half([batch])):
                    raise _one_row(batch, recompute=False) from error
                most = smaller
                tell(f"out of memory at {batch.tokens} tokens: batches of {smaller} tokens from here on")
        if smaller:
            parts = stream.with_microbatches(smaller).packed([samples[sample] for sample in batch.samples])
            waiting.append(iter(parts))
            continue
        yield batch, found


@contextmanager
def not_twice(what: str, *, where: str, remedy: str) -> Iterator[None]:
    """Within it a lack of memory ends the run in one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory {what}", where=where, remedy=remedy) from error


def _half(batches: Sequence[Batch]) -> int:
    """Tokens of the half of the largest batch that can be cut; 0 where each is a single row."""
    divisible = [batch.tokens for batch in batches if len(batch.samples) > 1]
    return max(1, max(divisible) // 2) if divisible else 0


def _one_row(batch: Batch, *, recompute: bool, what: str = "") -> OutOfMemory:
    return OutOfMemory(
        f"out of memory with a single row{what} in a microbatch", where=str(batch.sources[0]),
        value=f"{batch.tokens} tokens", remedy=_SHORTER, tokens=batch.tokens, recompute=recompute,
    )  # fmt: skip
