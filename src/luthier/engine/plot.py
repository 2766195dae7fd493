"""`loss.png`: the training and held-out loss over steps, drawn from the journal at the end of a run.

matplotlib is imported here and only when a picture is drawn; it draws to a file, no display is needed.
Skipped steps leave a mark, resumes do not: a resumed run's picture is that of an unbroken one.
"""

from __future__ import annotations

from pathlib import Path

from luthier.engine.journal import read

_SMOOTH_OVER = 25


def draw_loss(journal: Path, picture: Path, *, title: str = "") -> bool:
    """False where the journal holds no step."""
    rows = list(read(journal))
    steps = [(row["step"], row["loss"]) for row in rows if row["event"] == "step"]
    held_out = [(r["step"], r["eval_loss"]) for r in rows if r["event"] == "evaluate" and r["eval_loss"] is not None]
    skipped = [row["step"] for row in rows if row["event"] == "skip"]
    if not steps:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    x, y = zip(*steps, strict=True)
    axes.plot(x, y, color="#9db4c0", linewidth=1, label="training loss")
    if len(y) >= 2 * _SMOOTH_OVER:
        axes.plot(x, _smoothed(y), color="#253237", linewidth=2, label=f"mean of about {_SMOOTH_OVER} steps")
    if held_out:
        at, loss = zip(*held_out, strict=True)
        axes.plot(at, loss, "o-", color="#e07a5f", linewidth=1.5, markersize=4, label="held-out loss")
    for step in skipped:
        axes.axvline(step, color="#b23a48", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(picture)
    return True


def _smoothed(values: tuple[float, ...]) -> list[float]:
    """Exponential mean, corrected for its start."""
    keep, mean, made = 1 - 1 / _SMOOTH_OVER, 0.0, []
    for index, value in enumerate(values, start=1):
        mean = keep * mean + (1 - keep) * value
        made.append(mean / (1 - keep**index))
    return made
