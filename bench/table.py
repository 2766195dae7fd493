"""A result as a page: a table, and beneath it the conditions under which it holds.

Numbers come from the results; nothing is computed here but units. A ratio is the median of per-step ratios, its
range beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = Sequence[str]
WHAT_TRAINS = {"lora": "LoRA r 16 on all linear layers", "full": "every weight"}


def table(head: Row, rows: Sequence[Row], left: int = 1) -> str:
    """Markdown; the first `left` columns are words, the others numbers."""
    marks = ["---"] * left + ["---:"] * (len(head) - left)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (head, marks, *rows))


def race_page(result: dict[str, Any]) -> str:
    """The page of sft, full and dpo."""
    return f"# {result['title']}\n\n{race_table(result)}\n{bullets(race_conditions(result))}"


def race_table(result: dict[str, Any], ours: str = "luthier") -> str:
    head = (
        "system", "useful tokens/s", "Luthier is faster by", "peak memory", "above the weights",
        "Luthier's share of it", "largest loss difference", "difference of what trained",
    )  # fmt: skip
    weights = result["weights_bytes"]
    return table(head, [_row(result, name, weights, name == ours) for name in result["systems"]])


def _row(result: dict[str, Any], name: str, weights: int, ours: bool) -> Row:
    system = result["systems"][name]
    peak, off = system["peak_bytes"], system.get("tensor_difference")
    shown = [result["titles"][name], f"{system['tokens_per_second']:.0f}"]
    if ours:
        return [*shown, "", megabytes(peak), megabytes(peak - weights), "", "", ""]
    ratio = f"{system['luthier_is_faster_by']:.2f}x ({spread(system['ratios'])})"
    return [
        *shown, ratio, megabytes(peak), megabytes(peak - weights), f"{system['luthier_memory_share']:.2f}",
        f"{system['loss_difference']:.1e}", "" if off is None else f"{off:.1e}",
    ]  # fmt: skip


def race_conditions(result: dict[str, Any]) -> list[str]:
    low, high = result["length_range"]
    rows = "pairs" if result["objective"] == "dpo" else "rows"
    return [
        machine(result),
        f"{model_words(result['shape'])}, {megabytes(result['weights_bytes'])}.",
        f"{rows.capitalize()}: {result['rows_per_step']} a step; sequences of {low} to {high} tokens, median "
        f"{result['length_median']:.0f}, {result['trained_share']:.0%} trained; padding in this order leaves "
        f"{result['padding_efficiency']:.0%} useful.",
        f"Trained: {WHAT_TRAINS[result['method']]}, AdamW {result['learning_rate']:g}; {result['timed_steps']} timed "
        "steps after one that warms up, systems interleaved step by step, medians; the range is that of the steps. "
        "Same rows, order and starting tensors; differences are against Luthier after the last step (relative, all "
        "trained tensors" + (", to how far they moved)." if result["method"] == "full" else ")."),
        "Peak memory is the largest resident set of the system's own process, interpreter and libraries included.",
        f"Luthier runs at {result['systems']['luthier']['share_of_gemm_peak']:.0%} of the fp32 matrix peak measured "
        "between the steps, counting only operations that cannot be spared.",
        versions(result),
    ]  # fmt: skip


def machine(result: dict[str, Any]) -> str:
    return (
        f"Measured {result['when']} on {result['cpu']}, {result['threads']} threads, allocator {result['allocator']}."
    )


def model_words(shape: dict[str, int]) -> str:
    return (
        f"Model: Llama, width {shape['hidden_size']}, {shape['num_hidden_layers']} layers, vocabulary "
        f"{shape['vocab_size']:,}, random weights, fp32"
    )


def versions(result: dict[str, Any]) -> str:
    named = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"Versions: python {result['python']}, luthier {result['luthier']}, {named}."


def bullets(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def megabytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MB"


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}"
