"""`python -m bench.full`: every weight trains, by TRL, by a bare transformers loop, and by Luthier.

As bench/sft.py without an adapter: same weights to start from, same rows, AdamW at a constant rate, so losses and all
final weights are compared; the difference of the weights is relative to how far they moved.
"""

from __future__ import annotations

from dataclasses import replace

from bench import options
from bench.race import LUTHIER
from bench.sft import BARE, BARE_HALVES, BEST, DOCUMENTED
from bench.side_by_side import Bout, measure
from bench.table import race_page

SYSTEMS = {
    "luthier": LUTHIER,
    "trl": replace(DOCUMENTED, title="TRL, as documented"),
    "trl_best": replace(BEST, title="TRL, one row a batch, accumulated, memory kept by the allocator"),
    "bare": replace(BARE, title="transformers, bare loop"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("full", __doc__, steps=3)
    options.with_systems(parser, list(SYSTEMS))
    parsed = parser.parse_args(arguments)
    halves = {"bare": BARE_HALVES} if parsed.model == "s128k" else {}
    title = f"Full fine-tuning on a CPU ({parsed.model})"
    result = measure(Bout(bench="full", title=title, entries={**SYSTEMS, **halves}, method="full"), parsed)
    options.write(parsed.out, f"full-{parsed.model}", result, race_page(result))


if __name__ == "__main__":
    main()
