"""What a person sees at the end: both scores, answers side by side, the loss, where things lie, what to do next.

Plain text that reads the same in a log; on a terminal rich adds colour. Ten seconds should be enough.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TextIO

from luthier.quickstart.lesson import Report, Sample

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 48
_LONGEST = 110


def lines(report: Report, program: str = "luthier") -> list[str]:
    """The closing page."""
    losses = report.losses
    return [
        "",
        f"The task: a note in, a JSON record out. Exact match on {report.rows} notes that training never saw:",
        f"  base   {_bar(report.base_score)} {report.base_score:6.1%}",
        f"  tuned  {_bar(report.tuned_score)} {report.tuned_score:6.1%}",
        "",
        *[line for sample in report.samples for line in _side_by_side(sample)],
        f"Loss {losses[0]:.2f} {sparkline(losses)} {losses[-1]:.2f} over {len(losses)} steps"
        f"  ({report.run_dir / 'loss.png'})",
        f"Adapter  {report.adapter_dir}  (PEFT layout)",
        f"Done in {report.seconds:.0f} s.",
        "",
        "Ask it yourself:",
        f'  {program} generate {report.run_dir} --prompt "{report.samples[0].note if report.samples else "..."}"',
        f"  {program} merge {report.adapter_dir} --out merged",
        "With your own model and data:",
        f"  {program} recipes cp lora-sft",
        f"  {program} train lora-sft.yaml model=PATH_OF_MODEL data.train=YOUR_ROWS.jsonl",
    ]


def show(report: Report, program: str = "luthier", out: TextIO | None = None) -> None:
    out = out or sys.stdout
    if not out.isatty():
        print("\n".join(lines(report, program)), file=out)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=out, highlight=False)
    for line in lines(report, program):
        console.print(Text(line, style=_style(line)), soft_wrap=True)


def sparkline(values: Sequence[float]) -> str:
    """The course of the loss in one line of bars, on a logarithmic scale."""
    size = max(1, math.ceil(len(values) / _WIDTH))
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    logs = [math.log(max(mean, 1e-4)) for mean in means]
    low, span = min(logs), (max(logs) - min(logs)) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in logs)


def _side_by_side(sample: Sample) -> list[str]:
    mark = "right" if sample.tuned.strip() == sample.expected else f"wrong, expected {sample.expected}"
    return [
        f"  note   {sample.note}",
        f"  base   {_short(sample.base)}",
        f"  tuned  {_short(sample.tuned)}  ({mark})",
        "",
    ]


def _bar(share: float) -> str:
    full = round(share * 20)
    return "█" * full + "░" * (20 - full)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _style(line: str) -> str:
    if line.startswith("  tuned"):
        return "red" if "(wrong" in line else "green"
    if line.startswith("  base"):
        return "dim"
    return "bold" if line.endswith(":") else ""
