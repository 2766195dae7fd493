"""The bench's result as a page: a table, and beneath it the conditions under which it holds.

Numbers come from `bench.sft.summarise`; nothing is computed here but units. A ratio is the median of per-step
ratios, its range beside it.
"""

from __future__ import annotations

from typing import Any

NAMES = {
    "luthier": "Luthier",
    "trl": "TRL + PEFT, as documented",
    "trl_best": "TRL + PEFT, one row a batch, accumulated",
    "bare": "transformers + PEFT, bare loop",
}


def markdown(result: dict[str, Any]) -> str:
    head = (
        "| system | useful tokens/s | Luthier is faster by | peak memory | above the weights | Luthier's share of it "
        "| largest loss difference | adapter difference |\n|---|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    rows = "".join(_row(name, system, result["weights_bytes"]) for name, system in result["systems"].items())
    return f"# LoRA fine-tuning on a CPU ({result['model']})\n\n{head}{rows}\n{_conditions(result)}"


def _row(name: str, system: dict[str, Any], weights: int) -> str:
    peak = system["peak_bytes"]
    ours = name == "luthier"
    cells = [
        NAMES[name], f"{system['tokens_per_second']:.0f}",
        "" if ours else f"{system['luthier_is_faster_by']:.2f}x ({_range(system['ratios'])})", _megabytes(peak),
        _megabytes(peak - weights), "" if ours else f"{system['luthier_memory_share']:.2f}",
        "" if ours else f"{system['loss_difference']:.1e}", "" if ours else f"{system['adapter_difference']:.1e}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |\n"


def _conditions(result: dict[str, Any]) -> str:
    shape, low, high = result["shape"], *result["length_range"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"Measured {result['when']} on {result['cpu']}, {result['threads']} threads, allocator {result['allocator']}.",
        f"Model: Llama, width {shape['hidden_size']}, {shape['num_hidden_layers']} layers, "
        f"vocabulary {shape['vocab_size']:,}, random weights, fp32, {_megabytes(result['weights_bytes'])}.",
        f"Rows: {result['rows_per_step']} a step, {low} to {high} tokens, median {result['length_median']:.0f}, "
        f"{result['trained_share']:.0%} trained; padding in this order leaves "
        f"{result['padding_efficiency']:.0%} useful.",
        f"LoRA r 16 on all linear layers, AdamW 1e-3; {result['timed_steps']} timed steps after one that warms up, "
        "systems interleaved step by step, medians; the range is that of the steps. Same rows, order and starting "
        "adapter; differences are against Luthier after the last step (adapter: relative, all tensors).",
        "Peak memory is the largest resident set of the system's own process, interpreter and libraries included.",
        f"Luthier runs at {result['share_of_gemm_peak']:.0%} of the fp32 matrix peak measured between the steps, "
        "counting only operations that cannot be spared.",
        f"Versions: python {result['python']}, {versions}.",
    ]
    return "".join(f"- {line}\n" for line in lines)


def _megabytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MB"


def _range(values: list[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}"
