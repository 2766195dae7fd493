"""`python -m bench.quality`: is what was tuned as good? Luthier and TRL + PEFT at an equal token budget, 3 seeds each.

    notes   the quickstart's task on the quickstart's base model: exact match on held-out notes
    gsm8k   grade-school mathematics as chats on `stories260K-chatml`: loss on held-out rows

Both train the same rows for the same epochs with the same rows a step, rate, schedule and rank; each shuffles and
starts its adapter by its own seed, as its users' runs do, and TRL reads the chats its own way (prompt and completion
as messages). All adapters are scored by one judge, Luthier's `evaluate`. gsm8k needs the model and rows named by
LUTHIER_TEST_DATA and is left out by name where they are absent. Writes bench/results/quality.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import conditions, options, protocol
from bench.table import bullets, machine, table, versions

NOTES, GSM8K = "notes", "gsm8k"
MODEL, QUESTIONS = "models/stories260K-chatml", "raw/gsm8k/test.jsonl"
SIZES = {NOTES: (1200, 200), GSM8K: (320, 100)}  # rows that train, rows held out
TRAIN: dict[str, Any] = {
    "epochs": 1, "rows_per_step": 16, "learning_rate": 4e-3, "schedule": "cosine", "warmup_ratio": 0.0,
    "adam_betas": (0.9, 0.98), "max_grad_norm": 1.0,
}  # fmt: skip
R, MAX_TOKENS = 16, 512
SEEDS = (1, 2, 3)


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("quality", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=[NOTES, GSM8K], default=[NOTES, GSM8K])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--small", type=int, default=1, help="divide the numbers of rows by this: a quick look")
    parser.add_argument("--base", type=Path, help="base model of the notes, in place of the quickstart's")
    parsed = parser.parse_args(arguments)
    result: dict[str, Any] = {
        **conditions.conditions("quality", parsed), "train": TRAIN, "r": R, "seeds": parsed.seeds, "tasks": {},
        "left_out": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        for task in parsed.tasks:
            place = Path(name) / task
            place.mkdir()
            if missing := _missing(task):
                result["left_out"][task] = f"absent: {missing} (set LUTHIER_TEST_DATA)"
                continue
            result["tasks"][task] = _task(task, place, parsed)
    options.write(parsed.out, "quality", result, page(result))


def data_root() -> Path:
    return Path(os.environ.get("LUTHIER_TEST_DATA") or protocol.ROOT.parent / "shared" / "data")


def _missing(task: str) -> str | None:
    wanted = (MODEL, QUESTIONS) if task == GSM8K else ()
    return next((name for name in wanted if not (data_root() / name).exists()), None)


def _task(task: str, place: Path, parsed: argparse.Namespace) -> dict[str, Any]:
    train, held_out, base = (_gsm8k if task == GSM8K else _notes)(place, parsed)
    scores: dict[str, list[float]] = {"luthier": [], "trl": []}
    seconds: dict[str, list[float]] = {"luthier": [], "trl": []}
    for seed in parsed.seeds:
        for name, tune in (("luthier", _luthier), ("trl", _trl)):
            begin = time.perf_counter()
            adapter = tune(base, train, place / f"{name}-{seed}", seed, parsed)
            seconds[name].append(time.perf_counter() - begin)
            scores[name].append(_score(task, adapter, held_out, base))
            print(f"bench: {task} {name} seed {seed}: {scores[name][-1]:.4f}", file=sys.stderr, flush=True)
    means = {name: statistics.fmean(found) for name, found in scores.items()}
    spreads = {name: statistics.stdev(found) if len(found) > 1 else 0.0 for name, found in scores.items()}
    return {
        "measure": "held-out loss" if task == GSM8K else "exact match",
        "base_score": _score(task, base, held_out, base),
        "scores": scores, "means": means, "spreads": spreads, "seconds": seconds,
        "difference": means["luthier"] - means["trl"], "rows": [_count(train), _count(held_out)],
    }  # fmt: skip


def _count(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def _write(place: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = place / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _notes(place: Path, parsed: argparse.Namespace) -> tuple[Path, Path, Path]:
    from luthier.quickstart import cached, task

    sizes = cached.settings()
    base = parsed.base or cached.folder(sizes) / "model"
    if not (base / "config.json").is_file():
        print("bench: training the quickstart's base model, once", file=sys.stderr, flush=True)
        base = cached.trained_base(sizes, lambda event: None)
    trained, held_out = (count // parsed.small for count in SIZES[NOTES])
    rows = task.rows(sizes["rows_seed"], trained, "open"), task.rows(sizes["rows_seed"], held_out, "held_out")
    task.check(*rows)
    return _write(place, "train.jsonl", rows[0]), _write(place, "held_out.jsonl", rows[1]), base


def _gsm8k(place: Path, parsed: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Questions and answers as chats, those that fit the model's positions."""
    from transformers import AutoTokenizer

    base = data_root() / MODEL
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for line in (data_root() / QUESTIONS).read_text("utf-8").splitlines():
        row = json.loads(line)
        messages = [
            {"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]},
        ]  # fmt: skip
        if len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)) <= MAX_TOKENS:
            found.append({"messages": messages})
    trained, held_out = (count // parsed.small for count in SIZES[GSM8K])
    train, rest = found[:trained], found[trained : trained + held_out]
    return _write(place, "train.jsonl", train), _write(place, "held_out.jsonl", rest), base


def _luthier(base: Path, rows: Path, out: Path, seed: int, parsed: argparse.Namespace) -> Path:
    import luthier

    recipe = luthier.Recipe(
        model=str(base), data={"train": str(rows), "max_tokens": MAX_TOKENS}, method={"name": "lora", "r": R},
        train={**TRAIN, "seed": seed, "save_every": 10**6}, output_dir=str(out),
        engine={"device": "cpu", "threads": parsed.threads},
    )  # fmt: skip
    training = luthier.train(recipe, fresh=True)
    training.wait()
    return training.result


def _trl(base: Path, rows: Path, out: Path, seed: int, parsed: argparse.Namespace) -> Path:
    settings = {
        "base": str(base), "rows": str(rows), "out": str(out), "seed": seed, "r": R, "max_tokens": MAX_TOKENS,
        "threads": parsed.threads, **TRAIN,
    }  # fmt: skip
    if parsed.one_process:
        import_module("bench.rivals.trl_tune").tune(settings)
        return out
    path = os.pathsep.join([str(protocol.ROOT), str(protocol.ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(parsed.threads)}
    command = [parsed.rivals_python, "-m", "bench.rivals.trl_tune", json.dumps(settings)]
    done = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench: TRL stopped; the end of its log:\n{done.stderr[-2000:]}")
    return out


def _score(task: str, target: Path, held_out: Path, base: Path) -> float:
    import luthier

    told = luthier.evaluate(
        target, on=str(held_out), exact_match=task == NOTES, max_new_tokens=64, max_tokens=MAX_TOKENS,
        base=None if target == base else str(base),
    )  # fmt: skip
    return float(told["exact_match" if task == NOTES else "loss"])


def page(result: dict[str, Any]) -> str:
    head = ("task", "measure", "base", "Luthier", "TRL + PEFT", "difference")
    rows = []
    for name, task in result["tasks"].items():
        shown = [f"{task['means'][s]:.3f} ± {task['spreads'][s]:.3f}" for s in ("luthier", "trl")]
        rows.append([name, task["measure"], f"{task['base_score']:.3f}", *shown, f"{task['difference']:+.3f}"])
    told = [
        machine(result),
        f"Seeds {', '.join(map(str, result['seeds']))}; mean and standard deviation. LoRA r {result['r']}, "
        f"{result['train']['epochs']} epoch, {result['train']['rows_per_step']} rows a step, rate "
        f"{result['train']['learning_rate']:g}, cosine; each system's own shuffle and adapter start.",
        *(f"{name}: {task['rows'][0]:,} rows train, {task['rows'][1]:,} are held out." for name, task in
          result["tasks"].items()),
        *(f"{name} was left out: {why}." for name, why in result["left_out"].items()),
        versions(result),
    ]  # fmt: skip
    return f"# Equal quality\n\n{table(head, rows, left=2)}\n{bullets(told)}"


if __name__ == "__main__":
    main()
