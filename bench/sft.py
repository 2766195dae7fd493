"""`python -m bench.sft`: LoRA fine-tuning by TRL + PEFT, by a bare transformers + PEFT loop, and by Luthier.

Same model, same rows in the same order, same starting adapter, same AdamW; one process for each system, their
steps interleaved so that the machine's moods hit all alike. Compared after the last step: losses of every step and
all adapter tensors. Reported: useful (non-padding) tokens per second, medians of per-step ratios, peak memory of
each process, share of the fp32 matrix peak measured between the steps. Rivals may live in an environment of their
own (--rivals-python; pins in bench/requirements-rivals.txt). Writes bench/results/sft.json and sft.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import protocol, work
from bench.table import markdown

RESULTS = Path(__file__).with_name("results")
SYSTEMS = {
    "luthier": ("bench.luthier_sft", {}),
    "trl": ("bench.rivals.trl_sft", {}),
    "trl_best": ("bench.rivals.trl_sft", {"rows_per_batch": 1}),
    "bare": ("bench.rivals.bare_loop", {}),
}
PACKAGES = ("torch", "transformers", "peft", "trl", "tokenizers")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as directory:
        result = measure(options, Path(directory))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sft.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = markdown(result)
    (options.out / "sft.md").write_text(table, encoding="utf-8")
    print(table)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.sft", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(work.SHAPES), default="s32k")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that warms up")
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--longest", type=int, default=work.LONGEST, help="longest row in tokens")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--rivals-python", default=sys.executable, help="interpreter of the rivals' environment")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if "luthier" not in options.systems:
        parser.error("--systems must name luthier: its stream orders the rows")
    return options


def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Run all systems; the whole result as plain data."""
    weights = work.make_model(options.model, directory / "model")
    vocabulary = work.SHAPES[options.model]["vocab_size"]
    steps = options.steps + 1
    settings: dict[str, Any] = {
        "model": str(directory / "model"), "vocabulary": vocabulary, "threads": options.threads,
        "rows": steps * options.rows_per_step, "rows_per_step": options.rows_per_step, "steps": steps,
        "longest": options.longest, "directory": str(directory),
    }  # fmt: skip
    systems: dict[str, protocol.System] = {}
    try:
        for name in sorted(options.systems, key=list(SYSTEMS).index):
            module, extra = SYSTEMS[name]
            python = sys.executable if name == "luthier" else options.rivals_python
            systems[name] = protocol.System(name, module, python, options.threads, directory / f"{name}.log")
            opened = systems[name].ask("open", **settings, **extra)
            settings["plan"] = opened.pop("plan", None) or settings["plan"]
        seconds, losses, peaks = _interleave(systems, steps, options.threads)
        closed = {name: system.ask("close") for name, system in systems.items()}
        rows = work.make_rows(settings["rows"], vocabulary, longest=options.longest)
        result = _conditions(options, weights, [[rows[i] for i in plan] for plan in settings["plan"]])
        result["gemm_gflops"] = peaks
        result["systems"] = {
            name: {
                "seconds": seconds[name], "losses": losses[name], "peak_bytes": closed[name]["peak_bytes"],
                "adapter_difference": _difference(closed["luthier"]["tensors"], closed[name]["tensors"]),
            }
            for name in systems
        }  # fmt: skip
    finally:
        for system in systems.values():
            system.stop()
    return summarise(result)


def _interleave(
    systems: dict[str, protocol.System], steps: int, threads: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """One step of each system in turn, the first system of a round rotating."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    losses: dict[str, list[float]] = {name: [] for name in systems}
    peaks, names = [], list(systems)
    for step in range(steps):
        peaks.append(gemm_gflops(threads))
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            reply = systems[name].ask("step")
            seconds[name].append(reply["seconds"])
            losses[name].append(reply["loss"])
        said = "  ".join(f"{name} {seconds[name][-1]:.2f} s" for name in names)
        print(f"bench: step {step + 1}/{steps}  {said}", file=sys.stderr, flush=True)
    return seconds, losses, peaks


def gemm_gflops(threads: int) -> float:
    """The best of a few fp32 products of the model's own size, now."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 512), torch.randn(512, 1408)
    best = float("inf")
    for _ in range(12):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * 2048 * 512 * 1408 / best / 1e9


def _difference(ours: str, theirs: str) -> float:
    """|ours - theirs| / |theirs| over all adapter tensors, which must have the same names."""
    from safetensors.torch import load_file

    left, right = load_file(ours), load_file(theirs)
    if left.keys() != right.keys():
        raise SystemExit(f"bench: other adapter tensors: {sorted(left.keys() ^ right.keys())[:4]}")
    off = sum(float((left[name].double() - right[name].double()).square().sum()) for name in right)
    size = sum(float(right[name].double().square().sum()) for name in right)
    return float((off / size) ** 0.5)


def _conditions(options: argparse.Namespace, weights: int, steps: list[list[work.Row]]) -> dict[str, Any]:
    lengths = sorted(len(row.ids) for rows in steps for row in rows)
    useful = [sum(len(row.ids) for row in rows) for rows in steps]
    padded = [max(len(row.ids) for row in rows) * len(rows) for rows in steps]
    trained = [sum(len(row.ids) - row.prompt for row in rows) for rows in steps]
    versions = "import json; from importlib.metadata import version; print(json.dumps({n: version(n) for n in %r}))"
    command = [options.rivals_python, "-c", versions % (PACKAGES,)]
    return {
        "when": time.strftime("%Y-%m-%d"), "model": options.model, "shape": work.SHAPES[options.model],
        "weights_bytes": weights, "rows_per_step": options.rows_per_step, "timed_steps": options.steps,
        "threads": options.threads, "useful_tokens": useful, "trained_tokens": trained,
        "padding_efficiency": sum(useful) / sum(padded), "trained_share": sum(trained) / sum(useful),
        "length_median": statistics.median(lengths), "length_range": [lengths[0], lengths[-1]],
        "needed_gflop": [needed_gflop(work.SHAPES[options.model], rows) for rows in steps],
        "cpu": _cpu(), "python": platform.python_version(), "allocator": os.environ.get("LD_PRELOAD", "default"),
        "luthier": version("luthier") if _installed("luthier") else "source",
        "versions": json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout),
    }  # fmt: skip


def needed_gflop(shape: dict[str, int], rows: list[work.Row]) -> float:
    """Matrix operations that no trainer of this adapter can do without: no padding, head at trained positions only.

    Frozen linear: forward and input gradient; adapter: forward, input and weight gradient; causal half of attention.
    """
    width, layers, ffn = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    narrow = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    linears = [
        (width, width),
        (width, narrow),
        (width, narrow),
        (width, width),
        (width, ffn),
        (width, ffn),
        (ffn, width),
    ]
    frozen = layers * sum(a * b for a, b in linears)
    adapter = layers * sum(work.R * (a + b) for a, b in linears)
    tokens, trained = sum(len(row.ids) for row in rows), sum(len(row.ids) - row.prompt for row in rows)
    attention = layers * sum(2 * width * len(row.ids) ** 2 for row in rows)  # QK and PV, half of the square
    head = 2 * 2 * trained * width * shape["vocab_size"]
    return (tokens * (4 * frozen + 6 * adapter) + 3 * attention + head) / 1e9


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Medians over the timed steps (the first warms up), and Luthier against each."""
    ours = result["systems"]["luthier"]
    for system in result["systems"].values():
        timed = list(zip(result["useful_tokens"][1:], system["seconds"][1:], strict=True))
        system["tokens_per_second"] = statistics.median(tokens / seconds for tokens, seconds in timed)
        ratios = [theirs / mine for theirs, mine in zip(system["seconds"][1:], ours["seconds"][1:], strict=True)]
        system["luthier_is_faster_by"] = statistics.median(ratios)
        system["ratios"] = ratios
        system["luthier_memory_share"] = ours["peak_bytes"] / system["peak_bytes"]
        pairs = zip(system["losses"], ours["losses"], strict=True)
        system["loss_difference"] = max(abs(theirs - mine) for theirs, mine in pairs)
    shares = [
        needed / seconds / peak
        for needed, seconds, peak in zip(
            result["needed_gflop"][1:], ours["seconds"][1:], result["gemm_gflops"][1:], strict=True
        )
    ]
    result["share_of_gemm_peak"] = statistics.median(shares)
    return result


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    try:
        return bool(find_spec(name)) and bool(version(name))
    except ImportError:
        return False


if __name__ == "__main__":
    main()
