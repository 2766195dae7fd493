"""TRL's best working setting, searched instead of guessed: `python -m bench.sft --search`.

Each candidate is a setting that TRL's or transformers' documentation offers for speed, run on the same rows as all
others, interleaved; those that fail on this machine are recorded with the reason. Useful tokens per second decide.
`same` says whether a step holds the rows that Luthier's step holds: packing and grouping by length choose rows of
their own, so they show what speed they would give but cannot have their losses compared.

Left out with the reason: Liger kernels (need Triton, which is not for CPUs), bf16 (10 times slower than fp32 on CPUs
without AVX-512 or AMX), gradient checkpointing (TRL's default; trades time for memory), FlashAttention (CUDA).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench import conditions, race, work

# glibc maps large blocks anew for each use, and each first touch of a page is a fault; these keep them in one heap.
# (Its MALLOC_MMAP_THRESHOLD_ would be the milder word, but it ignores values beyond 32 MB.)
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_ARENA_MAX": "1"}
MODULE = "bench.rivals.trl_sft"
# name -> (settings of the worker, environment, whether a step holds the same rows)
CANDIDATES: dict[str, tuple[dict[str, Any], dict[str, str], bool]] = {
    "as documented": ({}, {}, True),
    "as documented, memory kept": ({}, KEEPS_MEMORY, True),
    "1 row a batch": ({"rows_per_batch": 1}, {}, True),
    "1 row a batch, memory kept": ({"rows_per_batch": 1}, KEEPS_MEMORY, True),
    "2 rows a batch": ({"rows_per_batch": 2}, {}, True),
    "1 row a batch, eager attention": ({"rows_per_batch": 1, "attention": "eager"}, {}, True),
    "1 row a batch, torch.compile": ({"rows_per_batch": 1, "options": {"torch_compile": True}}, {}, True),
    "1 row a batch, flex attention": ({"rows_per_batch": 1, "attention": "flex_attention"}, {}, True),
    "padding-free, sdpa": ({"options": {"padding_free": True, "max_length": None}}, {}, True),
    "group by length": ({"options": {"train_sampling_strategy": "group_by_length"}}, {}, False),
    "packing (bfd), sdpa": ({"rows_per_batch": 1, "options": {"packing": True}}, {}, False),
}


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """(result, page). Candidates run one after another, with the bench's first system as a common measure beside."""
    shape, steps = work.SHAPES[options.model], options.steps + 1
    result: dict[str, Any] = {**conditions.conditions("search", options), "model": options.model, "tried": {}}
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        directory = Path(name)
        work.make_model(shape, directory / "model")
        for candidate in options.candidates:
            settings, environment, same = CANDIDATES[candidate]
            entries = {
                "luthier": race.LUTHIER,
                "trl": race.Entry(title=candidate, module=MODULE, settings=settings, environment=environment),
            }
            result["tried"][candidate] = {"same_rows": same, **_try(entries, options, steps, directory)}
    return result, page(result)


def _try(
    entries: dict[str, race.Entry], options: argparse.Namespace, steps: int, directory: Path
) -> dict[str, Any]:  # fmt: skip
    course = race.Course(
        steps=steps, threads=options.threads, directory=directory, rivals_python=options.rivals_python,
            one_process=options.one_process,
        measure_peak=False, settings={
            "model": str(directory / "model"), "vocabulary": work.SHAPES[options.model]["vocab_size"],
            "rows": steps * options.rows_per_step * 4, "rows_per_step": options.rows_per_step,
            "longest": options.longest, "method": "lora", "objective": "sft", "learning_rate": work.RATES["lora"],
        },
    )  # fmt: skip
    try:
        raced = race.run(entries, course)
    except SystemExit as failed:
        return {"failed": str(failed).strip().splitlines()[-1][:200]}
    rows = work.make_rows(course.settings["rows"], course.settings["vocabulary"], longest=options.longest)
    useful = [sum(len(rows[index].ids) for index in step) for step in raced["plan"]]
    ours, theirs = raced["systems"]["luthier"], raced["systems"]["trl"]
    rates = [count / seconds for count, seconds in zip(theirs["tokens"][1:], theirs["seconds"][1:], strict=True)]
    mine = [count / seconds for count, seconds in zip(useful[1:], ours["seconds"][1:], strict=True)]
    return {
        "tokens_per_second": statistics.median(rates), "peak_bytes": theirs["peak_bytes"],
        "luthier_is_faster_by": statistics.median(a / b for a, b in zip(mine, rates, strict=True)),
        "loss_difference": max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)),
    }  # fmt: skip


def page(result: dict[str, Any]) -> str:
    lines = [
        f"# TRL's settings on a CPU ({result['model']})\n",
        "| setting | useful tokens/s | Luthier is faster by | peak memory | same rows | largest loss difference |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for name, tried in result["tried"].items():
        if "failed" in tried:
            lines.append(f"| {name} | failed | | | | {tried['failed'].replace('|', '/')} |")
            continue
        same = "yes" if tried["same_rows"] else "no"
        difference = f"{tried['loss_difference']:.1e}" if tried["same_rows"] else ""
        lines.append(
            f"| {name} | {tried['tokens_per_second']:.0f} | {tried['luthier_is_faster_by']:.2f}x | "
            f"{tried['peak_bytes'] / 2**20:,.0f} MB | {same} | {difference} |"
        )
    return "\n".join(lines) + "\n"
