"""`python -m bench.curves`: 100 steps of Luthier and of TRL + PEFT, their loss curves on top of each other.

The race of bench/sft.py over more steps of a small model, with rows that have something to learn (64 tokens, some of
them frequent), for LoRA and for full fine-tuning. What is measured is the largest difference between the two losses
of any step; it must stay below 1e-3. Writes bench/results/curves.json and .md.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from bench import options
from bench.race import LUTHIER, OURS
from bench.sft import SECOND
from bench.side_by_side import Bout, measure
from bench.table import bullets, machine, model_words, table, versions

SYSTEMS = {OURS: LUTHIER, "trl": replace(SECOND, title="TRL + PEFT", settings={})}
COMMON = 64
KEPT = ("bench", "when", "cpu", "cores", "threads", "allocator", "python", "luthier", "versions", "model", "shape")


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("curves", __doc__, steps=99, rows=4, model="tiny")
    options.with_systems(parser, list(SYSTEMS))
    parsed = parser.parse_args(arguments)
    entries = {name: SYSTEMS[name] for name in SYSTEMS if name in parsed.systems}
    rng = random.Random(0)
    count = (parsed.steps + 1) * parsed.rows_per_step
    lengths = [rng.randint(16, min(96, parsed.longest)) for _ in range(count)]
    result: dict[str, Any] = {"methods": {}}
    for method in ("lora", "full"):
        bout = Bout(
            bench="curves", title=method, entries=entries, method=method,
            settings={"lengths": lengths, "common": COMMON, "learning_rate": 2e-3 if method == "lora" else 5e-4},
        )  # fmt: skip
        raced = measure(bout, parsed)
        result |= {name: raced[name] for name in KEPT}
        result["methods"][method] = {
            "losses": {name: system["losses"] for name, system in raced["systems"].items()},
            "largest_difference": max(system["loss_difference"] for system in raced["systems"].values()),
            "tensor_difference": max(system["tensor_difference"] for system in raced["systems"].values()),
            "learning_rate": raced["learning_rate"],
        }  # fmt: skip
    result |= {"steps": parsed.steps + 1, "rows_per_step": parsed.rows_per_step}
    options.write(parsed.out, "curves", result, page(result))


def page(result: dict[str, Any]) -> str:
    head = ("trained", "first loss", "last loss", "largest difference of any step", "difference of what trained")
    rows = []
    for method, told in result["methods"].items():
        ours = told["losses"][OURS]
        rows.append([
            method, f"{ours[0]:.4f}", f"{ours[-1]:.4f}", f"{told['largest_difference']:.1e}",
            f"{told['tensor_difference']:.1e}",
        ])  # fmt: skip
    told = [
        machine(result), f"{model_words(result['shape'])}.",
        f"{result['steps']} steps of {result['rows_per_step']} rows beside TRL + PEFT, same rows, order and start, "
        "AdamW at a constant rate, clipping at 1.",
        versions(result),
    ]  # fmt: skip
    return f"# Loss curves beside TRL's\n\n{table(head, rows)}\n{bullets(told)}"


if __name__ == "__main__":
    main()
