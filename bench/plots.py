"""One plot for each kind of result, drawn from its JSON alone: SVG text, the same bytes for the same numbers.

Luthier's colour is the same in all. A plot shows what the bench claims (ratios, slopes, curves on top of each other),
never more than its table says.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

OURS, THEIRS, THIRD = "#1b6ca8", "#9aa5b1", "#d98e32"
OTHERS = (THEIRS, THIRD, "#5b6770", "#c9b79c")
Draw = Callable[[Figure, dict[str, Any]], None]


def svg(draw: Draw, result: dict[str, Any], digest: str) -> str:
    """The picture as text; `digest` names the result that it was drawn from."""
    with mpl.rc_context({"svg.hashsalt": "luthier", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        draw(figure, result)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
    return f"{text}\n<!-- drawn from {digest} -->\n"


def race(figure: Figure, result: dict[str, Any]) -> None:
    """Speed and peak memory, a bar for each system."""
    left, right = figure.subplots(1, 2)
    names = list(result["systems"])[::-1]
    labels = [_short(result["titles"][name]) for name in names]
    colours = [OURS if name == "luthier" else THEIRS for name in names]
    systems = [result["systems"][name] for name in names]
    bars = left.barh(labels, [system["tokens_per_second"] for system in systems], color=colours)
    said = ["" if n == "luthier" else f"1/{s['luthier_is_faster_by']:.1f}" for n, s in zip(names, systems, strict=True)]
    left.bar_label(bars, said, padding=3)
    left.set_xlabel("useful tokens per second")
    right.barh(labels, [system["peak_bytes"] / 2**30 for system in systems], color=colours)
    right.set_yticks([])
    right.set_xlabel("peak memory, GB")


def memory(figure: Figure, result: dict[str, Any]) -> None:
    """Peak above the weights in each cell."""
    places = list(dict.fromkeys((cell["method"], cell["model"], cell["tokens"]) for cell in result["cells"]))
    axes, width = figure.subplots(), 0.8 / len(result["titles"])
    for index, (name, title) in enumerate(result["titles"].items()):
        cells = [cell for cell in result["cells"] if cell["system"] == name]
        above = [(cell["peak_bytes"] - result["weights_bytes"][cell["model"]]) / 2**30 for cell in cells]
        at = [place + index * width for place in range(len(above))]
        colour = OURS if name == "luthier" else OTHERS[index % len(OTHERS)]
        axes.bar(at, above, width, label=_short(title), color=colour)
    axes.set_xticks([place + 0.3 for place in range(len(places))], [f"{a}\n{b}\n{c} tokens" for a, b, c in places])
    axes.set_ylabel("peak above the weights, GB")
    axes.legend(frameon=False)


def scale(figure: Figure, result: dict[str, Any]) -> None:
    """Time over what it should follow, with the fitted slope; held bytes over planned ones."""
    left, right = figure.subplots(1, 2)
    for name, fit in result["fits"].items():
        ones = [one for one in result["points"] if one["series"] == name]
        seconds = [statistics.median(one["seconds"]) for one in ones]
        left.plot([one["needed_gflop"] for one in ones], seconds, "o-", label=f"{name}: {fit['exponent']:.2f}")
        megabytes = [(one["planned_bytes"] / 2**20, one["held_bytes"] / 2**20) for one in ones]
        right.plot(*zip(*megabytes, strict=True), "o", label=name)
    left.set(xscale="log", yscale="log", xlabel="needed Gflop", ylabel="seconds a step")
    left.legend(frameon=False, title="series: exponent")
    most = max(one["planned_bytes"] / 2**20 for one in result["points"])
    right.plot([0, most], [0, most], color=THEIRS, linewidth=0.8)
    right.set(xlabel="planned MB", ylabel="held MB")


def sharing(figure: Figure, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    bars = axes.bar(list(result["shares"]), [one["faster_by"] for one in result["shares"].values()], 0.5, color=OURS)
    axes.bar_label(bars, [f"{one['faster_by']:.2f}x" for one in result["shares"].values()])
    axes.axhline(1.0, color=THEIRS, linewidth=0.8)
    axes.set(xlabel="shared tokens of a side", ylabel="shared over whole rows")


def curves(figure: Figure, result: dict[str, Any]) -> None:
    """Both losses; that only one line is seen is the point."""
    for axes, (method, told) in zip(figure.subplots(1, 2), result["methods"].items(), strict=True):
        for name, losses in told["losses"].items():
            ours = name == "luthier"
            axes.plot(losses, color=OURS if ours else THIRD, linewidth=1 if ours else 4, alpha=1 if ours else 0.5,
                      label="Luthier" if ours else "TRL", zorder=3 if ours else 2)  # fmt: skip
        axes.set(title=f"{method}: differ by at most {told['largest_difference']:.0e}", xlabel="step", ylabel="loss")
        axes.legend(frameon=False)


def quality(figure: Figure, result: dict[str, Any]) -> None:
    """Mean and spread of each system, every seed a dot."""
    grid = figure.subplots(1, max(1, len(result["tasks"])), squeeze=False)[0]
    for axes, (name, task) in zip(grid, result["tasks"].items(), strict=False):
        for at, (system, scores) in enumerate(task["scores"].items()):
            colour = OURS if system == "luthier" else THIRD
            axes.errorbar(at, task["means"][system], task["spreads"][system], fmt="_", color=colour, capsize=6)
            axes.plot([at] * len(scores), scores, "o", color=colour, markersize=4)
        axes.set_xticks(range(len(task["scores"])), [s.replace("luthier", "Luthier").replace("trl", "TRL") for s in
                                                     task["scores"]])  # fmt: skip
        axes.set(title=name, ylabel=task["measure"], xlim=(-0.6, 1.6))


def profile(figure: Figure, result: dict[str, Any]) -> None:
    """Shares of a step's time."""
    axes = figure.subplots()
    methods = list(result["methods"])
    left = [0.0] * len(methods)
    for name in result["methods"][methods[0]]["shares"]:
        shares = [result["methods"][method]["shares"][name] for method in methods]
        axes.barh(methods, shares, left=left, label=name)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set(xlabel="share of the step", xlim=(0, 1))
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _short(title: str) -> str:
    return (
        title.replace(", memory kept by the allocator", "*").replace(", accumulated", "").replace("TRL + PEFT", "TRL")
    )


DRAW: dict[str, Draw] = {
    "sft": race, "full": race, "dpo-each": race, "dpo-cached": race, "gpu": race, "memory": memory, "scale": scale,
    "sharing": sharing, "curves": curves, "quality": quality, "profile": profile,
}  # fmt: skip
