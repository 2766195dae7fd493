"""`python -m bench.dpo`: DPO with LoRA by TRL + PEFT, by a bare loop, and by Luthier; and what a shared prompt saves.

Four pairs a step, prompts of about 250 tokens, answers of about 130, each closed by `</s>` on all sides. Two races:
the reference policy run in every step (dpo-each), and its scores made before the first step (dpo-cached: TRL's
`precompute_ref_log_probs`, Luthier's `reference: cached`). Then Luthier against itself (sharing): the same pairs as
forests that hold the prompt once, and as two whole rows each, at 25, 50 and 75 % of a side's tokens shared: losses,
gradients and steps compared. Writes bench/results/dpo-each, dpo-cached, sharing (.json, .md).
"""

from __future__ import annotations

from dataclasses import replace

from bench import options, sharing, work
from bench.race import LUTHIER, Entry
from bench.search import KEEPS_MEMORY
from bench.side_by_side import Bout, measure
from bench.table import race_page

TRL = Entry(title="TRL + PEFT, as documented", module="bench.rivals.trl_dpo")
BEST = Entry(
    title="TRL + PEFT, one pair a batch, accumulated, memory kept by the allocator", module="bench.rivals.trl_dpo",
    settings={"rows_per_batch": 1}, environment=KEEPS_MEMORY,
)  # fmt: skip
BARE = Entry(title="transformers + PEFT, bare loop", module="bench.rivals.bare_dpo", settings={"cached": False})
EACH = {
    "luthier": replace(LUTHIER, settings={"objective_fields": {"beta": work.BETA, "reference": "method_off"}}),
    "trl": TRL, "trl_best": BEST, "bare": BARE,
}  # fmt: skip
_BEFORE = {"precompute_ref_log_probs": True}
CACHED = {
    "luthier": replace(LUTHIER, settings={"objective_fields": {"beta": work.BETA, "reference": "cached"}}),
    "trl": replace(TRL, settings={"options": _BEFORE}),
    "trl_best": replace(BEST, settings={"rows_per_batch": 1, "options": _BEFORE}),
    "bare": replace(BARE, settings={"cached": True}),
}  # fmt: skip
RACES = {
    "dpo-each": Bout(
        bench="dpo-each", title="DPO with LoRA on a CPU, reference in each step", entries=EACH, objective="dpo",
        reference=True,
    ),
    "dpo-cached": Bout(
        bench="dpo-cached", title="DPO with LoRA on a CPU, reference scored before", entries=CACHED, objective="dpo"
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("dpo", __doc__, steps=3, rows=4)
    options.with_systems(parser, list(EACH))
    parser.add_argument("--parts", nargs="+", choices=[*RACES, "sharing"], default=[*RACES, "sharing"])
    parsed = parser.parse_args(arguments)
    for name, bout in RACES.items():
        if name in parsed.parts:
            result = measure(bout, parsed)
            options.write(parsed.out, name, result, race_page(result))
    if "sharing" in parsed.parts:
        options.write(parsed.out, "sharing", *sharing.run(parsed))


if __name__ == "__main__":
    main()
