"""A plan as a page for people: terms with what they are, the moments, time, what to change, notes.

The JSON twin has the same numbers in bytes; here amounts are MB and GB of 1e6 and 1e9 bytes. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WHY = {
    "weights": "of the base, as stored",
    "adapter": "what trains beside the frozen base",
    "optimizer": "averages, from the first step on",
    "gradients": "float32, of what trains",
    "activations": "kept for the backward",
    "in flight": "gradients through one layer",
    "logits": "hidden rows and a tile or chunk, never N x V",
    "casts": "copies of trained weights in the dtype that computes",
    "workspace": "a matrix dequantised or widened",
    "evaluation": "forward of held-out rows",
}


def amount(size: float) -> str:
    """12.3 GB, 456 MB."""
    if size >= 1e9:
        return f"{size / 1e9:,.2f} GB"
    return f"{size / 1e6:,.1f} MB"


def lines(plan: Mapping[str, Any]) -> list[str]:
    """The whole page."""
    model, memory = plan["model"], plan["memory"]
    found = [
        f"{model['family']}, {model['parameters']:,} parameters; {plan['method']} trains {model['trainable']:,} "
        f"({model['trainable'] / model['total']:.3%})",
        f"microbatch {memory['tokens']:,} tokens, {memory['scored']:,} scored; "
        f"{plan['course']['microbatches']} in a step",
        "", *_terms(memory), "", *_moments(memory),
    ]  # fmt: skip
    if plan.get("time"):
        found += ["", *_time(plan["time"])]
    if plan.get("layout"):
        found += ["", *_layout(plan["layout"])]
    if plan.get("fit"):
        found += ["", *_fit(plan["fit"])]
    return [*found, *([""] if plan["notes"] else []), *(f"note: {note}" for note in plan["notes"])]


def _terms(memory: Mapping[str, Any]) -> list[str]:
    rows = [(name, amount(size), WHY.get(name, "")) for name, size in memory["terms"].items()]
    rows.append(("peak", amount(memory["peak_bytes"]), f"at: {memory['moment']}; largest term: {memory['limiting']}"))
    rows.append(("needs", amount(memory["needs_bytes"]), f"with {memory['beyond']}"))
    return table(rows)


def _moments(memory: Mapping[str, Any]) -> list[str]:
    return ["moments  " + ", ".join(f"{name} {amount(size)}" for name, size in memory["moments"].items())]


def _time(time: Mapping[str, Any]) -> list[str]:
    source = "measured here" if time["measured"] else "data sheet or given, not measured"
    found = [
        f"time (estimate)  {time['tokens_per_second']:,.0f} tokens/s, {time['step_seconds']:.2f} s a step, "
        f"{_length(time)} on {time['device']}; most of it: {time['limiting']}",
        f"  rate {time['tflops']:.2f} TFLOP/s ({source}) at {time['utilisation']:.0%} utilisation",
    ]  # fmt: skip
    return found + table([
        (name, f"{one['tokens_per_second']:,.0f} tokens/s", f"{_length(one)}, {one['verdict']}")
        for name, one in time.get("devices", {}).items()
    ])  # fmt: skip


def _layout(layout: Sequence[Mapping[str, Any]]) -> list[str]:
    head = f"states on each of {layout[0]['ranks']} GPUs (weights, gradients, mixed Adam; no activations)"
    return [head, *table([
        (one["way"], amount(one["device_bytes"]), f"sends {one['sent_elements'] / 1e6:,.1f} million numbers a step")
        for one in layout
    ])]  # fmt: skip


def _length(time: Mapping[str, Any]) -> str:
    if time["hours"] is None:
        return f"steps not known, {time['step_seconds']:.2f} s each"
    return f"{time['steps']:,} step{'s' * (time['steps'] != 1)}, {time['hours']:.2f} h"


def _fit(fit: Mapping[str, Any]) -> list[str]:
    room = amount(fit["room_bytes"])
    if fit["fits"]:
        return [f"fits into {room}"]
    found = [f"does not fit into {room}: {amount(fit['over_bytes'])} too much; the changes that save most"]
    found += table([
        (one["override"], f"saves {amount(one['saves_bytes'])}", f"{one['words']}; needs {amount(one['needs_bytes'])}")
        for one in fit["best"]
    ])  # fmt: skip
    if fit["fits_with"]:
        found.append(f"fits with {' '.join(fit['together'])}: needs {amount(fit['together_needs_bytes'])}")
    else:
        found.append(f"nothing fits: with all of them it still needs {amount(fit['together_needs_bytes'])}")
    return found


def table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Left, right, left."""
    if not rows:
        return []
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"  {name:<{first}}  {size:>{second}}  {why}".rstrip() for name, size, why in rows]
