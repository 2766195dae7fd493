"""`python -m bench.activations`: what recomputing activations saves and costs, for LoRA and full fine-tuning.

One process and one model for each method. Every setting of engine.checkpoint_activations is switched on, runs a whole
step (forward, backward, update at a rate of 0, so that all run on the same weights) and is taken out again; the
settings alternate within each step, so a busy machine slows all alike, and times are ratios to keeping everything
within that step. Peaks come from an untimed step of each (bench/allocated.py); losses and gradient norms are compared.
Writes activations-MODEL.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import conditions, options, plan, work
from bench.allocated import Allocated
from bench.table import bullets, machine, megabytes, model_words, spread, table, versions

SETTINGS: dict[str, Any] = {"false": False, "3": 3, "2": 2, "attention": "attention", "mlp": "mlp", "true": True}
METHODS = ("lora", "full")


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("activations", __doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a microbatch, two rows")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parsed = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(parsed.threads)
    result = {
        **conditions.conditions("activations", parsed), "model": parsed.model, "shape": work.SHAPES[parsed.model],
        "tokens": parsed.tokens, "timed_steps": parsed.steps, "methods": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        work.make_model(work.SHAPES[parsed.model], Path(name) / parsed.model)
        for method in parsed.methods:
            result["methods"][method] = _method(method, parsed, Path(name))
    options.write(parsed.out, f"activations-{parsed.model}", result, page(result))


def _method(method: str, parsed: argparse.Namespace, place: Path) -> dict[str, Any]:
    from luthier.engine.optimizer import build_optimizer
    from luthier.engine.seeds import deterministic
    from luthier.engine.strategy.single import Single
    from luthier.models.recompute import Recomputed

    made = plan._assembled((parsed.model, method, False, parsed.tokens), parsed.threads, place)
    strategy = Single(made.device, made.precision)
    model = strategy.place(made.loaded.model)
    optimizer = build_optimizer(made.method, model, made.recipe.train, 1e-4)
    strategy.bind(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model.train()

    def step(said: Any) -> tuple[float, float, float]:
        """(seconds, loss, gradient norm)."""
        recomputed = Recomputed(model, said) if said else None
        batches = made.stream.step(0)
        weight = sum(made.objective.weight(batch) for batch in batches)
        begin = time.perf_counter()
        loss, _ = strategy.forward_backward(batches, lambda batch: made.scorer.loss(batch, None), weight)
        norm = strategy.clip(work.MAX_NORM)
        strategy.step()
        strategy.zero()
        seconds = time.perf_counter() - begin
        if recomputed is not None:
            recomputed.undo()
        return seconds, loss, norm

    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in SETTINGS}
    with deterministic(made.device):
        with Allocated() as seen:
            step(False)  # makes the optimizer's state, and the room of the gradients
            for name, said in SETTINGS.items():
                seen.peak = seen.now
                _, loss, norm = step(said)
                found[name] |= {"peak_bytes": weights + seen.peak, "loss": loss, "grad_norm": norm}
        for number in range(parsed.steps + 1):
            names = list(SETTINGS) if number % 2 else list(reversed(SETTINGS))
            for name in names:
                found[name]["seconds"].append(step(SETTINGS[name])[0])
    strategy.release()
    return {"weights_bytes": weights, "settings": _against_kept(found)}


def _against_kept(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each beside keeping everything; the first step warms up."""
    kept = found["false"]
    for one in found.values():
        one["ratios"] = [a / b for a, b in zip(one["seconds"], kept["seconds"], strict=True)][1:]
        one["memory_share"] = one["peak_bytes"] / kept["peak_bytes"]
        one["loss_difference"] = abs(one["loss"] - kept["loss"]) / abs(kept["loss"])
        one["norm_difference"] = abs(one["grad_norm"] - kept["grad_norm"]) / kept["grad_norm"]
    return found


def page(result: dict[str, Any]) -> str:
    head = (
        "trained", "engine.checkpoint_activations", "peak", "above the weights", "share of the peak", "time of a step",
        "largest difference",
    )  # fmt: skip
    rows = [
        [method, name, megabytes(one["peak_bytes"]), megabytes(one["peak_bytes"] - told["weights_bytes"]),
         f"{one['memory_share']:.2f}", f"{statistics.median(one['ratios']):.2f}x ({spread(one['ratios'])})",
         f"{max(one['loss_difference'], one['norm_difference']):.1e}"]
        for method, told in result["methods"].items() for name, one in told["settings"].items()
    ]  # fmt: skip
    told = [
        machine(result), f"{model_words(result['shape'])}.",
        f"Two rows, {result['tokens']:,} tokens together, one microbatch; {result['timed_steps']} timed steps of each "
        "setting after one that warms up, alternating in one process; times are ratios to `false` within a step, the "
        "median and the range.",
        "Peak: bytes that torch's operations hold at most in a whole step, optimizer and gradients included. "
        "Difference: of loss and gradient norm, relative to `false`.",
        versions(result),
    ]  # fmt: skip
    return f"# Recomputing activations\n\n{table(head, rows, left=2)}\n{bullets(told)}"


if __name__ == "__main__":
    main()
