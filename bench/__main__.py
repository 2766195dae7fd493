"""`python -m bench`: every bench one after another, then the page; `make bench` is this.

The steps of each are planned for two cores and 40 minutes in all. `--only sft dpo` runs some of them. The GPU bench
joins where there is a GPU, the table of methods where it is named (`--only methods`). Words after `--` go to every
bench (`-- --rivals-python PATH`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from bench import page
from bench.protocol import ROOT

# name -> its command's words; beside each the minutes expected of two cores that do 175 Gflop/s together
PLAN: dict[str, tuple[str, ...]] = {
    "sft": ("sft", "--model", "s32k", "--steps", "4"),  # 6
    "sft-128k": ("sft", "--model", "s128k", "--steps", "2", "--systems", "luthier", "trl", "trl_best", "bare"),  # 6.5
    "full": ("full", "--model", "s32k", "--steps", "3"),  # 4
    "dpo": ("dpo", "--model", "s32k", "--steps", "2"),  # 7.5
    "memory": ("memory",),  # 4
    "plan": ("plan",),  # 3
    "scale": ("scale", "--steps", "2"),  # 3
    "curves": ("curves",),  # 1
    "quality": ("quality",),  # 7, two of them for the quickstart's base where it is not cached
    "profile": ("profile", "--model", "s32k", "--steps", "2"),  # 1
    "share": ("share",),  # 2
    "activations": ("activations", "--model", "s32k", "--steps", "3"),  # 2
}  # fmt: skip


# Not among the forty minutes: asked for by name (`--only methods`).
MORE: dict[str, tuple[str, ...]] = {
    "methods": ("methods",), "gpu": ("gpu",), "low-memory": ("low_memory", "--rows-per-step", "4"),
    "formats": ("formats",),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*PLAN, *MORE], default=None)
    parser.add_argument("more", nargs="*", help="words for every bench, after --")
    parsed = parser.parse_args()
    chosen = {name: words for name, words in PLAN.items() if parsed.only is None or name in parsed.only}
    wanted = parsed.only or (["gpu"] if _gpu() else [])
    chosen |= {name: words for name, words in MORE.items() if name in wanted}
    minutes = {}
    for name, (module, *words) in chosen.items():
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", f"bench.{module}", *words, *parsed.more], cwd=ROOT, check=True)
        minutes[name] = round((time.monotonic() - begin) / 60, 1)
        print(f"bench: {name} took {minutes[name]} minutes", file=sys.stderr, flush=True)
    page.main()
    print(json.dumps({"minutes": minutes, "in_all": round(sum(minutes.values()), 1)}))


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
