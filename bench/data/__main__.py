"""`python -m bench.data [GOAL …]`: measure the figures of the data road and write the table.

Every file of this folder that begins with `d` is asked for its figures in turn, in this process, so that ours and the
rival's are timed under one load. The goals are those of the table, figures.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import bench.data
from bench.conditions import cpu
from bench.data import Figure
from bench.table import table

RESULTS = Path(__file__).resolve().parent
_HEAD = ("goal", "what", "Luthier", "rival", "asked", "reached", "conditions")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__.splitlines()[0])
    parser.add_argument("goals", nargs="*", help="such as D11; default: all")
    parser.add_argument("--quick", action="store_true", help="small inputs: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args(arguments)
    path = parsed.out / "figures.json"
    before = json.loads(path.read_text("utf-8"))["figures"] if path.exists() else []
    figures, done = [], set()
    for module in modules():
        if parsed.goals and not set(module.GOALS) & set(parsed.goals):
            continue
        begin = time.monotonic()
        figures += [{**asdict(one), "machine": machine()} for one in module.measure(parsed.quick)]
        done |= set(module.GOALS)
        print(f"bench: {module.__name__} took {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    figures = sorted(figures + [one for one in before if one["goal"] not in done], key=lambda one: int(one["goal"][1:]))
    path.write_text(json.dumps({"figures": figures}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    path.with_suffix(".md").write_text(page(figures), "utf-8")


def modules() -> list[ModuleType]:
    """The files of this folder that measure, by name."""
    names = sorted(found.name for found in pkgutil.iter_modules(bench.data.__path__) if found.name.startswith("d"))
    return [import_module(f"bench.data.{name}") for name in names]


def machine() -> str:
    return f"{cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


def page(figures: Iterable[dict[str, Any]]) -> str:
    """The table, and beneath it the machines that gave its lines."""
    kept = list(figures)
    rows = [
        (one["goal"], one["what"], one["ours"], one["rival"], one["bar"], "yes" if one["met"] else "**no**",
         one["conditions"]) for one in kept
    ]  # fmt: skip
    machines = "".join(f"- {name}\n" for name in dict.fromkeys(str(one["machine"]) for one in kept))
    return f"# The data road: figures asked and seen\n\n{table(_HEAD, rows, left=7)}\nMeasured on:\n\n{machines}"


__all__ = ["Figure", "main", "page"]

if __name__ == "__main__":
    main()
