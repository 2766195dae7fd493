"""`python -m bench.gpu`: LoRA on an 8B-shaped bf16 Llama on one GPU, by Luthier, TRL + PEFT and Unsloth.

The model has the shape of Llama-3.1-8B and random weights made on the device: nothing is downloaded. A step is 16
rows that sum to 16,384 tokens, of uneven lengths; every system trains on the same rows in the same order from the
same adapter. TRL as documented pads and recomputes activations; TRL at its best runs padding-free with
FlashAttention where that is importable (else SDPA) and Liger's kernels where they are, a quarter of the rows at a
time. Unsloth runs where it installs. Reported: tokens/s, peak allocated memory, and MFU: needed operations
(bench/needed.py: recomputation and padding count nothing) over the peak of the device's data sheet and over a large
matrix product measured just before. `--smoke` is the same code on a CPU with a tiny model. Writes gpu.json and .md.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import conditions, luthier_worker, options, race, work
from bench.needed import Segment, needed_gflop
from bench.summary import WARM, summarise
from bench.table import bullets, megabytes, spread, table, versions

DENSE_BF16_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}
BUDGET, ROWS = 16_384, 16
PACKAGES = (*conditions.PACKAGES, "liger-kernel", "flash-attn", "unsloth")
MODULE = "bench.rivals.trl_sft"


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("gpu", __doc__, steps=5, rows=ROWS, model="8b")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, all in this process")
    parser.add_argument("--budget", type=int, default=BUDGET, help="tokens of a step")
    parser.add_argument("--microbatch-tokens", type=int, default=BUDGET // 4, help="tokens that Luthier runs at once")
    parsed = parser.parse_args(arguments)
    if parsed.smoke:
        parsed.model, parsed.budget, parsed.rows_per_step, parsed.one_process = "tiny", 256, 4, True
        parsed.microbatch_tokens = 128
    result = measure(parsed, "cpu" if parsed.smoke else "cuda")
    options.write(parsed.out, "gpu", result, page(result))


def entries(smoke: bool) -> dict[str, race.Entry]:
    """Luthier and the rivals that this machine can run."""
    here = {"liger": find_spec("liger_kernel") is not None, "flash": find_spec("flash_attn") is not None}
    best = {"padding_free": True, "max_length": None, "use_liger_kernel": here["liger"] and not smoke}
    attention = "flash_attention_2" if here["flash"] and not smoke else "sdpa"
    with_ = ", ".join([attention, *(["Liger"] if best["use_liger_kernel"] else [])])
    found = {race.OURS: race.LUTHIER}
    if not smoke:
        found["trl"] = race.Entry(
            title="TRL + PEFT, as documented", module=MODULE,
            settings={"rows_per_batch": 4, "options": {"gradient_checkpointing": True}},
        )  # fmt: skip
    found["trl_best"] = race.Entry(
        title=f"TRL + PEFT, padding-free, {with_}", module=MODULE,
        settings={"rows_per_batch": 2 if smoke else 4, "attention": attention, "options": best},
    )  # fmt: skip
    if find_spec("unsloth") is not None and not smoke:
        found["unsloth"] = race.Entry(
            title="Unsloth", module="bench.rivals.unsloth_sft", settings={"rows_per_batch": 4, "options": best}
        )
    return found


def measure(parsed: Any, device: str) -> dict[str, Any]:
    """The result as plain data."""
    steps, shape = parsed.steps + 1, work.SHAPES[parsed.model]
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        directory = Path(name)
        weights = work.make_model(shape, directory / "model", positions=8192, device=device)
        settings = {
            "model": str(directory / "model"), "vocabulary": shape["vocab_size"], "device": device,
            "rows": steps * parsed.rows_per_step, "rows_per_step": parsed.rows_per_step, "steps": steps,
            "longest": parsed.budget, "max_tokens": parsed.budget, "method": "lora", "objective": "sft",
            "learning_rate": 1e-4, "train": {"microbatch_tokens": parsed.microbatch_tokens},
        }  # fmt: skip
        plan = luthier_worker.plan(settings, settings["rows"])
        settings["lengths"] = lengths(plan, parsed.budget)
        known = device_facts(device)
        course = race.Course(
            steps=steps, threads=parsed.threads, directory=directory, rivals_python=parsed.rivals_python,
            settings=settings, measure_peak=False, one_process=parsed.one_process,
        )  # fmt: skip
        chosen = entries(parsed.smoke)
        raced = race.run(chosen, course)
        rows = work.rows_of(settings)
    of_steps = [[rows[index] for index in step] for step in raced.pop("plan")]
    result = {
        **conditions.conditions("gpu", parsed, PACKAGES), **known, "model": parsed.model, "shape": shape,
        "weights_bytes": weights, "timed_steps": parsed.steps, "budget": parsed.budget,
        "titles": {name: entry.title for name, entry in chosen.items()}, **conditions.row_facts(of_steps), **raced,
    }  # fmt: skip
    result["needed_gflop"] = [
        needed_gflop(shape, [Segment(len(row.ids), len(row.ids) - row.prompt) for row in step]) for step in of_steps
    ]
    for system in result["systems"].values():
        system["peak_bytes"] = system.get("device_peak_bytes") or system["peak_bytes"]
    summarise(result)
    for system in result["systems"].values():
        rates = [n / s for n, s in zip(result["needed_gflop"], system["seconds"], strict=True)][WARM:]
        system["mfu"] = statistics.median(rates) / result["peak_gflops"]
        system["share_of_measured_rate"] = statistics.median(rates) / result["measured_gflops"]
    return result


def lengths(plan: list[list[int]], budget: int) -> list[int]:
    """One length for each row: uneven, and each step's sum to the budget."""
    rng, found = random.Random(0), [0] * sum(len(step) for step in plan)
    for step in plan:
        weights = [rng.lognormvariate(0.0, 0.6) for _ in step]
        sizes = [max(8, int(budget * weight / sum(weights))) for weight in weights]
        sizes[sizes.index(max(sizes))] += budget - sum(sizes)
        for row, size in zip(step, sizes, strict=True):
            found[row] = size
    return found


def device_facts(device: str) -> dict[str, Any]:
    """Name, the data sheet's dense bf16 peak, and a large matrix product measured now."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        torch.mm(a, a)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    measured = 2 * size**3 / best / 1e9
    sheet = next((1000 * tflops for part, tflops in DENSE_BF16_TFLOPS.items() if part in name), measured)
    del a
    if device == "cuda":
        torch.cuda.empty_cache()
    return {"device": name, "peak_gflops": sheet, "measured_gflops": measured}


def page(result: dict[str, Any]) -> str:
    head = (
        "system", "useful tokens/s", "Luthier is faster by", "MFU", "of the measured rate", "peak memory",
        "Luthier's share of it", "largest loss difference",
    )  # fmt: skip
    rows = []
    for name, system in result["systems"].items():
        ours = name == race.OURS
        rows.append([
            result["titles"][name], f"{system['tokens_per_second']:,.0f}",
            "" if ours else f"{system['luthier_is_faster_by']:.2f}x ({spread(system['ratios'])})",
            f"{system['mfu']:.0%}", f"{system['share_of_measured_rate']:.0%}", megabytes(system["peak_bytes"]),
            "" if ours else f"{system['luthier_memory_share']:.2f}",
            "" if ours else f"{system['loss_difference']:.1e}",
        ])  # fmt: skip
    told = [
        f"Measured {result['when']} on {result['device']}; data sheet {result['peak_gflops'] / 1000:,.0f} TFLOP/s, a "
        f"large product here {result['measured_gflops'] / 1000:,.1f} TFLOP/s.",
        f"Llama of width {result['shape']['hidden_size']}, {result['shape']['num_hidden_layers']} layers, vocabulary "
        f"{result['shape']['vocab_size']:,}, random weights made on the device, {megabytes(result['weights_bytes'])}.",
        f"A step: {result['rows_per_step']} rows, {result['budget']:,} tokens, {result['length_range'][0]} to "
        f"{result['length_range'][1]} each, {result['trained_share']:.0%} trained. {result['timed_steps']} timed steps "
        "after one that warms up, interleaved, medians; caches are emptied between the steps, outside the time.",
        "MFU counts needed operations only: neither padding nor recomputed activations. Peak: allocated bytes.",
        versions(result),
    ]  # fmt: skip
    return f"# LoRA on a GPU ({result['model']})\n\n{table(head, rows)}\n{bullets(told)}"


if __name__ == "__main__":
    main()
