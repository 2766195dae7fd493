"""`python -m bench.formats`: the storage formats side by side in LoRA training: speed, what the weights take, the peak.

The same rows, the same adapter, one process, steps alternating: the base dense in fp32, in nf4 (with and without double
quantisation) and in int8. A format's speed is told as a share of the dense base's in the same round, its loss beside
the dense one's (they differ by the rounding of the weights). `--bitsandbytes` times the unpacking of one matrix of the
model against bitsandbytes' CPU kernel too, where that is installed. Writes bench/results/formats.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import conditions, options, work
from bench.allocated import Allocated
from bench.inside import Inside
from bench.table import bullets, machine, megabytes, model_words, table, versions

FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {}, "nf4": {"quantization": "nf4"},
    "nf4, scales in fp32": {"quantization": "nf4", "double_quantization": False},
    "int8": {"quantization": "int8"},
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("formats", __doc__, steps=4, model="qwen2-0.5b")
    parser.add_argument("--bitsandbytes", action="store_true", help="its unpacking of a matrix beside ours")
    parsed = parser.parse_args(arguments)
    result = run(parsed)
    options.write(parsed.out, "formats", result, page(result))


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(parsed.threads)
    shape = work.SHAPES[parsed.model]
    result: dict[str, Any] = {
        **conditions.conditions("formats", parsed), "model": parsed.model, "shape": shape,
        "rows_per_step": parsed.rows_per_step, "timed_steps": parsed.steps,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        directory = Path(name)
        work.make_model(shape, directory / "model", family=work.FAMILIES.get(parsed.model, "llama"))
        systems = {}
        for place, (title, fields) in enumerate(FORMATS.items()):
            systems[title] = Inside({
                "model": {"path": str(directory / "model"), **fields}, "vocabulary": shape["vocab_size"],
                "longest": parsed.longest, "rows": parsed.rows_per_step * (parsed.steps + 2),
                "rows_per_step": parsed.rows_per_step, "steps": parsed.steps + 2, "method": "lora",
                "objective": "sft", "learning_rate": work.RATES["lora"], "threads": parsed.threads,
                "directory": name, "name": f"format{place}",
            })  # fmt: skip
        result["formats"] = _measured(systems, parsed.steps)
    if parsed.bitsandbytes:
        result["unpacking"] = _unpacking(shape["intermediate_size"], shape["hidden_size"])
    return result


def _measured(systems: dict[str, Inside], steps: int) -> dict[str, Any]:
    """One step that warms up, one whose bytes are followed, then the timed ones, alternating."""
    told: dict[str, Any] = {title: {"seconds": [], "losses": []} for title in systems}
    for number in range(steps + 2):
        for title, system in systems.items():
            batches = system.batches(number)
            begin = time.perf_counter()
            if number == 1:
                with Allocated() as seen:
                    loss = system.gradient(batches)
                    system.update()
                told[title]["peak_above_weights"] = seen.peak
            else:
                loss = system.gradient(batches)
                system.update()
            told[title]["losses"].append(loss)
            if number > 1:
                told[title]["seconds"].append(time.perf_counter() - begin)
    for title, system in systems.items():
        frozen = [p for p in system.model.parameters() if not p.requires_grad] + list(system.model.buffers())
        one = told[title]
        one["weights"] = sum(tensor.numel() * tensor.element_size() for tensor in frozen)
        one["speed"] = statistics.median(a / b for a, b in zip(told["fp32"]["seconds"], one["seconds"], strict=True))
    return told


def _unpacking(outputs: int, inputs: int) -> dict[str, float]:
    """Seconds for one matrix, the best of ten, alternating; both give the same numbers."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from luthier.models.weights import nf4

    weight = torch.randn(outputs, inputs)
    stored, out = nf4.quantise(weight), torch.empty(outputs * inputs)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, theirs = [], []
    for _ in range(10):
        begin = time.perf_counter()
        nf4.dequantise_into(out, stored.codes, stored.absmax, stored.block)
        middle = time.perf_counter()
        other = dequantize_4bit(codes, state)
        theirs.append(time.perf_counter() - middle)
        ours.append(middle - begin)
    assert torch.equal(out.view(outputs, inputs), other)
    return {"luthier": min(ours), "bitsandbytes": min(theirs)}


def page(result: dict[str, Any]) -> str:
    head = ("base", "speed against fp32", "frozen weights", "peak above the weights", "loss of the last step")
    rows = [
        [title, f"{one['speed']:.2f}", megabytes(one["weights"]), megabytes(one["peak_above_weights"]),
         f"{one['losses'][-1]:.4f}"]
        for title, one in result["formats"].items()
    ]  # fmt: skip
    told = [
        machine(result), f"{model_words(result['shape'])}.",
        f"LoRA on all linears, {result['rows_per_step']} rows a step, {result['timed_steps']} timed steps in turns; "
        "medians of the ratio in each round. The peak is followed from operation to operation.",
        versions(result),
    ]  # fmt: skip
    if unpacking := result.get("unpacking"):
        told.append(f"Unpacking one matrix: {1e3 * unpacking['luthier']:.1f} ms, bitsandbytes "
                    f"{1e3 * unpacking['bitsandbytes']:.1f} ms.")  # fmt: skip
    return f"# Storage formats of the base\n\n{table(head, rows)}\n{bullets(told)}"


if __name__ == "__main__":
    main()
