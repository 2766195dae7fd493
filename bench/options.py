"""What every bench is asked on its command line, and where its result goes.

    python -m bench.NAME [--model s32k] [--steps 5] [--threads 2] [--rivals-python PATH] [--out bench/results]

`--steps` are timed steps, after one that warms up. `write` puts NAME.json and NAME.md side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import work

RESULTS = Path(__file__).with_name("results")


def parser(name: str, words: str, *, steps: int = 5, rows: int = 8, model: str = "s32k") -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=words.splitlines()[0])
    made.add_argument("--model", choices=sorted(work.SHAPES), default=model)
    made.add_argument("--steps", type=int, default=steps, help="timed steps, after one that warms up")
    made.add_argument("--rows-per-step", type=int, default=rows)
    made.add_argument("--longest", type=int, default=work.LONGEST, help="longest row in tokens")
    made.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    made.add_argument("--rivals-python", default=sys.executable, help="interpreter of the rivals' environment")
    made.add_argument("--one-process", action="store_true", help="all systems in this process: a quick look")
    made.add_argument("--out", type=Path, default=RESULTS)
    return made


def with_systems(made: argparse.ArgumentParser, names: list[str], asked: Sequence[str] = ()) -> None:
    """`names` race unless told otherwise; `asked` only where they are named."""
    made.add_argument("--systems", nargs="+", choices=[*names, *asked], default=names)


def write(out: Path, name: str, result: dict[str, Any], table: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(table, encoding="utf-8")
    print(table)
