"""Matrix operations that no trainer can do without: the physical cost of a step, and the measure of every bench.

    linear    frozen: forward and input gradient, 4 per weight and token; trained: and weight gradient, 6
    adapter   R (in + out) weights beside each linear, 6 per weight and token
    attention QK and PV over the causal half (and the whole shared prompt), forward and backward: 3 times the forward
    head      at scored positions only: 4 V D per token frozen, 6 trained
Left out, because they can be spared: padding; logits of prompts; in the last layer queries, output and MLP of
positions that are not scored; below the first adapter the gradient of the embedded tokens; recomputed attention.
A DPO reference scored each step adds its forward passes; a prompt shared by two answers is counted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Shape = dict[str, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """`tokens` of a forest segment after `before` tokens of its ancestors; `scored` of its tokens are predicted."""

    tokens: int
    scored: int
    before: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """`rank` None: every weight trains. `reference`: the frozen policy runs forward in each step too."""

    rank: int | None = 16
    reference: bool = False


def needed_gflop(shape: Shape, segments: Sequence[Segment], work: Work = Work()) -> float:
    """Gflop of one optimizer step over these segments."""
    width, layers, ffn = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    narrow = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    keys, rest = [(width, narrow)] * 2, [(width, width)] * 2 + [(width, ffn)] * 2 + [(ffn, width)]
    tokens, scored = sum(s.tokens for s in segments), sum(s.scored for s in segments)
    per_weight = 6 if work.rank is None else 4
    linear = per_weight * _passes(keys, rest, tokens, scored, layers)
    if work.rank is not None:
        linear -= 2 * tokens * (_weights(keys) + width * width)  # below the first adapter nothing trains
        linear += 6 * work.rank * _passes(keys, rest, tokens, scored, layers, adapter=True)
    pairs = sum(s.tokens * s.before + s.tokens**2 / 2 for s in segments)
    last = sum(s.scored * s.before + s.scored * (s.tokens - s.scored / 2) for s in segments)
    attention = 4 * width * ((layers - 1) * pairs + last)
    head = 2 * scored * width * shape["vocab_size"]
    total = linear + 3 * attention + per_weight // 2 * head
    if work.reference:
        total += 2 * _passes(keys, rest, tokens, scored, layers) + attention + head
    return total / 1e9


def _passes(
    keys: list[tuple[int, int]], rest: list[tuple[int, int]], tokens: int, scored: int, layers: int,
    adapter: bool = False,
) -> float:  # fmt: skip
    """Weights times the positions that need them: all layers whole but the last, whose queries and MLP are few."""
    size = _sides if adapter else _weights
    return tokens * (layers * size(keys) + (layers - 1) * size(rest)) + scored * size(rest)


def _weights(linears: list[tuple[int, int]]) -> int:
    return sum(a * b for a, b in linears)


def _sides(linears: list[tuple[int, int]]) -> int:
    return sum(a + b for a, b in linears)
