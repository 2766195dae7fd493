"""`python -m bench.low_memory`: LoRA on Qwen2-0.5B's shape on a CPU: what it holds, how fast, dense and in four bits.

Two passes over the same rows, steps and starting adapter, every system in a process of its own. First each alone for
two steps, its bytes followed from operation to operation: the frozen weights, the most that is held beside them, and
the largest resident set. Then all of them in turns, timed. TRL takes one row a batch and accumulates (a whole step of
padded rows does not fit a small machine), without and with its gradient checkpointing; `--systems trl` adds it as
documented. Writes low_memory.json and low_memory.md: also whether the goals of this bench hold.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import conditions, luthier_worker, options, race, work
from bench.sft import DOCUMENTED, SECOND
from bench.summary import summarise
from bench.table import bullets, machine, megabytes, model_words, spread, table, versions

MODEL, STEPS = "qwen2-0.5b", 2
COMMON = 4000  # characters that rows are made of: none that a family's tokenizer would compose or take apart
ABOVE, SHARE, SPEED = 0.8e9, 0.5, 0.8  # bytes above the weights; nf4's peak and speed against the dense base's
SYSTEMS = {
    "luthier": race.LUTHIER,
    "luthier_nf4": replace(
        race.LUTHIER, title="Luthier, base in nf4", settings={"model_fields": {"quantization": "nf4"}}
    ),
    "trl_second": SECOND,
    "trl_recompute": replace(
        SECOND, title=f"{SECOND.title}, activations computed twice",
        settings={**SECOND.settings, "options": {"gradient_checkpointing": True}},
    ),
}  # fmt: skip
ASKED = {"trl": DOCUMENTED}


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("low_memory", __doc__, steps=3, model=MODEL)
    options.with_systems(parser, list(SYSTEMS), list(ASKED))
    parser.add_argument("--held-only", action="store_true", help="without the timed pass")
    parsed = parser.parse_args(arguments)
    result = run(parsed)
    options.write(parsed.out, "low_memory", result, page(result))


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    shape, steps = work.SHAPES[parsed.model], STEPS if parsed.held_only else parsed.steps + 1
    entries = {name: entry for name, entry in {**SYSTEMS, **ASKED}.items() if name in parsed.systems}
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        directory = Path(name)
        weights = work.make_model(shape, directory / "model", family=work.FAMILIES.get(parsed.model, "llama"))
        drawn = work.make_rows(steps * parsed.rows_per_step, shape["vocab_size"], longest=parsed.longest)
        settings: dict[str, Any] = {
            "model": str(directory / "model"), "vocabulary": shape["vocab_size"], "rows": steps * parsed.rows_per_step,
            "rows_per_step": parsed.rows_per_step, "longest": parsed.longest, "method": "lora", "objective": "sft",
            "learning_rate": work.RATES["lora"], "common": min(COMMON, shape["vocab_size"] // 2),
            "lengths": [len(row.ids) for row in drawn],
        }  # fmt: skip
        course = race.Course(
            steps=STEPS, threads=parsed.threads, directory=directory, rivals_python=parsed.rivals_python,
            measure_peak=False, settings={**settings, "follow": True}, one_process=parsed.one_process,
        )  # fmt: skip
        held = {one: _held(one, entry, course) for one, entry in entries.items()}
        timed = {} if parsed.held_only else race.run(entries, replace(course, steps=steps, settings=settings))
        plan = luthier_worker.plan({**settings, "steps": steps}, settings["rows"])
        rows = work.rows_of(settings)
    result = {
        **conditions.conditions("low_memory", parsed), "model": parsed.model, "shape": shape, "weights_bytes": weights,
        "timed_steps": 0 if parsed.held_only else parsed.steps, "held": held,
        "titles": {one: entry.title for one, entry in entries.items()},
        **conditions.row_facts([[rows[index] for index in step] for step in plan]), **timed,
    }  # fmt: skip
    return summarise(result) if timed else result


def _held(name: str, entry: race.Entry, course: race.Course) -> dict[str, Any]:
    """One system alone, followed."""
    entry = replace(entry, module="bench.held") if entry.ours else entry
    alone = {"plan": luthier_worker.plan({**course.settings, "steps": STEPS}, course.settings["rows"])}
    told = race.run({name: entry}, replace(course, settings={**course.settings, **alone}))["systems"][name]
    return {**told["held"], "resident": told["peak_bytes"], "losses": told["losses"]}


def goals(result: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """(words, figure, whether it holds) of each goal that the systems at hand can tell."""
    held, found = result["held"], []
    if "luthier" in held:
        above = held["luthier"]["above"]
        words = f"dense, above the weights: {above / 1e9:.2f} GB (goal: at most {ABOVE / 1e9:g})"
        found.append((words, above, above <= ABOVE))
    if {"luthier", "luthier_nf4"} <= set(held):
        dense, packed = (held[name]["weights"] + held[name]["above"] for name in ("luthier", "luthier_nf4"))
        words = f"peak in nf4 over peak dense: {packed / dense:.2f} (goal: at most {SHARE:g})"
        found.append((words, packed / dense, packed <= SHARE * dense))
        if result.get("systems"):
            speed = 1 / result["systems"]["luthier_nf4"]["luthier_is_faster_by"]
            words = f"tokens per second in nf4 over dense: {speed:.2f} (goal: at least {SPEED:g})"
            found.append((words, speed, speed >= SPEED))
    return found


def page(result: dict[str, Any]) -> str:
    head = (
        "system", "frozen weights", "held above them", "in all", "resident", "useful tokens/s", "Luthier is faster by",
        "largest loss difference",
    )  # fmt: skip
    dense, rows = result["held"].get("luthier"), []
    for name, held in result["held"].items():
        timed = result.get("systems", {}).get(name)
        off = max(abs(a - b) for a, b in zip(held["losses"], dense["losses"], strict=True)) if dense else None
        rows.append([
            result["titles"][name], megabytes(held["weights"]), megabytes(held["above"]),
            megabytes(held["weights"] + held["above"]), megabytes(held["resident"]),
            "" if timed is None else f"{timed['tokens_per_second']:.0f}",
            "" if timed is None else f"{timed['luthier_is_faster_by']:.2f}x ({spread(timed['ratios'])})",
            "" if off is None else f"{off:.1e}",
        ])  # fmt: skip
    low, high = result["length_range"]
    words = model_words(result["shape"])
    words = words.replace("Llama", "Qwen2-0.5B (head tied, biases)") if result["model"] == MODEL else words
    told = [
        *(f"{'Holds' if holds else 'MISSED'}: {words}." for words, _, holds in goals(result)),
        machine(result),
        f"{words}, {megabytes(result['weights_bytes'])}; numbers of a bf16 file.",
        f"LoRA r {work.R} on all linear layers, {result['rows_per_step']} rows a step of {low} to {high} tokens, "
        f"median {result['length_median']:.0f}, {result['trained_share']:.0%} trained; default settings of each system "
        "beyond what its name says.",
        f"Held: bytes that torch's operations hold at most in {STEPS} steps, adapters, gradients and optimizer among "
        "them. Resident: the largest resident set of the process that was followed, libraries included.",
        f"Speed: {result['timed_steps']} timed steps in turns after one that warms up, medians; in four bits the loss "
        "differs by the rounding of the weights.",
        versions(result),
    ]  # fmt: skip
    return f"# LoRA on Qwen2-0.5B's shape, on a CPU\n\n{table(head, rows)}\n{bullets(told)}"


if __name__ == "__main__":
    main()
