"""`python -m bench.sft`: LoRA fine-tuning by TRL + PEFT, by a bare transformers + PEFT loop, and by Luthier.

Same model, same rows in the same order, same starting adapter, same AdamW; one process for each system, their
steps interleaved so that the machine's moods hit all alike. Compared after the last step: losses of every step and
all adapter tensors. Reported: useful (non-padding) tokens per second, medians of per-step ratios, peak memory of
each process, share of the fp32 matrix peak measured between the steps. Rivals may live in an environment of their
own (--rivals-python; pins in bench/requirements-rivals.txt). Writes bench/results/sft-MODEL.json and .md.

`--search` tries the settings of bench/search.py for TRL instead, and writes bench/results/search-MODEL.json: the two
best that do the same work are what `trl_best` and `trl_second` are.
"""

from __future__ import annotations

from dataclasses import replace

from bench import options, search
from bench.race import LUTHIER, Entry
from bench.side_by_side import Bout, measure
from bench.table import race_page

DOCUMENTED = Entry(title="TRL + PEFT, as documented", module="bench.rivals.trl_sft")
BEST = Entry(
    title="TRL + PEFT, one row a batch, accumulated, memory kept by the allocator", module="bench.rivals.trl_sft",
    settings={"rows_per_batch": 1}, environment=search.KEEPS_MEMORY,
)  # fmt: skip
SECOND = Entry(
    title="TRL + PEFT, one row a batch, accumulated", module="bench.rivals.trl_sft", settings={"rows_per_batch": 1}
)
BARE = Entry(title="transformers + PEFT, bare loop", module="bench.rivals.bare_loop")
# 8 rows of a 128k vocabulary are 16 GB of logits and their gradients: the bare loop takes them in two halves.
BARE_HALVES = Entry(
    title="transformers + PEFT, bare loop, 4 rows a batch", module="bench.rivals.bare_loop",
    settings={"rows_per_batch": 4},
)  # fmt: skip
SYSTEMS = {"luthier": LUTHIER, "trl": DOCUMENTED, "trl_best": BEST, "trl_second": SECOND, "bare": BARE}
# Not raced unless named: what the allocator's setting alone does for the others.
ASKED = {
    "luthier_kept": replace(LUTHIER, title="Luthier, memory kept by the allocator", environment=search.KEEPS_MEMORY),
    "bare_kept": replace(BARE, title="transformers + PEFT, bare loop, memory kept by the allocator",
                         environment=search.KEEPS_MEMORY),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("sft", __doc__)
    options.with_systems(parser, list(SYSTEMS), list(ASKED))
    parser.add_argument("--search", action="store_true", help="try TRL's settings instead of racing")
    parser.add_argument("--candidates", nargs="+", choices=list(search.CANDIDATES), default=list(search.CANDIDATES))
    parsed = parser.parse_args(arguments)
    if parsed.search:
        options.write(parsed.out, f"search-{parsed.model}", *search.run(parsed))
        return
    halves = {"bare": BARE_HALVES} if parsed.model == "s128k" else {}
    bout = Bout(
        bench="sft", title=f"LoRA fine-tuning on a CPU ({parsed.model})", entries={**SYSTEMS, **ASKED, **halves}
    )
    result = measure(bout, parsed)
    options.write(parsed.out, f"sft-{parsed.model}", result, race_page(result))


if __name__ == "__main__":
    main()
