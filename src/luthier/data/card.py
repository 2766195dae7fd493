"""README.md and stats.json of a built set: what is in it, where each row came from and went, how to make it again.

    facts   = card_facts(manifest, ledger, quality report)       plain JSON, stats.json
    README  = card(facts, samples)                               a function of the facts alone

No clock, no machine, no path but those of the recipe: the same manifest gives the same bytes. The front matter is what
the Hugging Face hub reads: license (unknown unless it is given: nothing is guessed of other people's rights), language
codes where the `language` step noted them, size and task categories, one configuration. Rows are shown only if asked
for, because a card is often more public than its set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.contracts.step import Item
from luthier.data.card_tables import block, inline, plain_figures, share, table
from luthier.data.spot_check import shown
from luthier.data.tally import Tally
from luthier.disk.durable import replace_text

README, STATS = "README.md", "stats.json"
_SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B")]  # fmt: skip
_TASKS = {"question answering": "question-answering", "summarisation": "summarization", "translation": "translation"}
_LEAST_SHARE = 0.01  # of a language in the front matter
_KNOWN_SHARE = 0.9  # of the rows have a language, or the front matter names none
_TASK_SHARE = 0.1
_SHOWN = 20  # lines of a table of counts


@dataclass(frozen=True, kw_only=True)
class CardWords:
    """What no file of the build says."""

    title: str = "Built data set"
    license: str = "unknown"
    samples: int = 0


def card_facts(manifest: Mapping[str, Any], ledger: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, Any]:
    """stats.json: all that the card says, in numbers."""
    ordered = [json.loads(json.dumps(part, sort_keys=True)) for part in (manifest, ledger)]  # as they lie on disk
    return {"manifest": ordered[0], "ledger": ordered[1], "quality": dict(quality)}


def write_card(directory: Path, facts: Mapping[str, Any], words: CardWords, samples: Sequence[Item] = ()) -> None:
    """Both files, each whole or not at all."""
    text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    replace_text(directory / STATS, text)
    replace_text(directory / README, card(json.loads(text), words, samples))


def card(facts: Mapping[str, Any], words: CardWords, samples: Sequence[Item] = ()) -> str:
    """The README as text."""
    manifest, ledger, quality = facts["manifest"], facts["ledger"], facts["quality"]
    steps = [Tally.from_json(made) for made in ledger["steps"]]
    parts = [
        _front(quality, words), f"# {inline(words.title)}", _summary(manifest, ledger, quality),
        _sources(ledger, steps, quality), _steps(steps), *_special(steps), _lengths(quality), _contents(quality),
        _quality(quality), _made(manifest), *_samples(samples),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(quality: Mapping[str, Any], words: CardWords) -> str:
    tables, rows = quality["tables"], quality["rows"]
    codes = {name: count for name, count in tables["languages"].items() if re.fullmatch(r"[a-z]{2,3}", name)}
    known = sum(codes.values()) >= _KNOWN_SHARE * rows  # half of the languages would be a wrong statement
    languages = sorted(name for name, count in codes.items() if known and count >= _LEAST_SHARE * rows)
    tasks = [task for name, task in _TASKS.items() if tables["tasks"].get(name, 0) >= _TASK_SHARE * rows]
    kinds = sorted(tables["kinds"])
    size = next((name for limit, name in _SIZES if rows < limit), "n>1B")
    lines = [f"license: {json.dumps(words.license)}", f"pretty_name: {json.dumps(words.title, ensure_ascii=False)}"]
    lines += [f"language: {json.dumps(languages)}"] if languages else []
    lines += [
        f"size_categories: {json.dumps([size])}", f"task_categories: {json.dumps(['text-generation', *tasks])}",
        f"tags: {json.dumps(['luthier', *kinds])}", "configs:", "- config_name: default", "  data_files:",
        "  - split: train", "    path: train.jsonl",
    ]  # fmt: skip
    return "\n".join(["---", *lines, "---"])


def _summary(manifest: Mapping[str, Any], ledger: Mapping[str, Any], quality: Mapping[str, Any]) -> str:
    rows, read = ledger["rows"], ledger["sources"]["read"]
    kinds = ", ".join(f"{count:,} {name}" for name, count in quality["tables"]["kinds"].items())
    warned = len(quality["warnings"])
    return (
        f"{rows:,} rows ({kinds}) from {read:,} rows of {len(manifest['inputs'])} files, made by luthier "
        f"{manifest['luthier']}. {warned or 'No'} figure{'s' if warned != 1 else ''} of the quality report "
        f"{'are' if warned != 1 else 'is'} out of bounds."
    )


def _sources(ledger: Mapping[str, Any], steps: Sequence[Tally], quality: Mapping[str, Any]) -> str:
    origins, rows = quality["tables"]["origins"], quality["rows"]
    came = steps[0].origins if steps else {}
    files = [
        (one["file"], one["read"], one["kept"],
         _reasons({name: reason["count"] for part in ("dropped", "rejected") for name, reason in one[part].items()}))
        for one in ledger["sources"]["files"]
    ]  # fmt: skip
    built = [(name or "-", came.get(name, ["-", "-"])[0], count, share(count, rows)) for name, count in origins.items()]
    left = [(name, counts[0], 0, share(0, rows)) for name, counts in came.items() if name not in origins]
    return block(
        "Sources", table(("file", "rows read", "kept", "rejected as wrong"), files),
        table(("source", "rows before the steps", "rows in the set", "share"), [*built, *left]),
    )  # fmt: skip


def _steps(steps: Sequence[Tally]) -> str:
    if not steps:
        return block("Steps", "No steps: the rows are those of the files.")
    rows = [
        (step.name, step.read, _reasons(step.added), _reasons({name: one.count for name, one in step.left.items()}),
         step.kept, _reasons(step.changed)) for step in steps
    ]  # fmt: skip
    words = "In each line: read + added = kept + each reason."
    return block("Steps", words, table(("step", "read", "added", "left, by reason", "kept", "changed in rows"), rows))


def _special(steps: Sequence[Tally]) -> list[str]:
    """What readers look for by name: duplicates, contamination, personal data, mixture; then other steps' figures."""
    titles = {"decontaminate": "Contamination", "pii": "Personal data", "mix": "Mixture"}
    groups: dict[str, list[Tally]] = {"Duplicates": [], "Contamination": [], "Personal data": [], "Mixture": []}
    for step in steps:
        title = "Duplicates" if step.name.endswith("dedup") else titles.get(step.name, "")
        if title:
            groups[title].append(step)
        elif step.figures:
            groups.setdefault(f"Figures of {step.name}", []).append(step)
    absent = {
        "Duplicates": "No step looked for duplicates.",
        "Contamination": "No step looked for evaluation rows in the set.",
        "Personal data": "No step looked for personal data.", "Mixture": "The sources stand as they came: no mixture.",
    }  # fmt: skip
    return [
        block(title, *(_found(step) for step in found)) if found else block(title, absent[title])
        for title, found in groups.items()
    ]


def _found(step: Tally) -> str:
    gone = _reasons({name: one.count for name, one in step.left.items()}) or "none"
    changed = f"; changed: {_reasons(step.changed)}" if step.changed else ""
    said = f"`{step.name}` read {step.read:,} rows. Left out: {gone}{changed}."
    return "\n\n".join([said, *plain_figures(step.figures)])


def _lengths(quality: Mapping[str, Any]) -> str:
    lengths = quality["tables"]["length"]
    names = [name for name in next(iter(lengths.values()), {}) if name != "rows"]
    return block(
        "Length", table(("", *names), [(what, *(one[name] for name in names)) for what, one in lengths.items()])
    )


def _contents(quality: Mapping[str, Any]) -> str:
    tables, rows = quality["tables"], quality["rows"]
    names = {"languages": "language", "tasks": "task (guessed)", "shape": "has", "turns": "turns"}
    parts = []
    for name, title in names.items():
        counts = list(tables[name].items())
        more = [("others", sum(count for _, count in counts[_SHOWN:]))] if len(counts) > _SHOWN else []
        if counts:
            lines = [(what, count, share(count, rows)) for what, count in [*counts[:_SHOWN], *more]]
            parts.append(table((title, "rows", "share"), lines))
    if tables["notes"]:
        names_ = list(next(iter(tables["notes"].values())))
        notes = [(name, *(one.get(n, "") for n in names_)) for name, one in tables["notes"].items()]
        parts.append(table(("note", *names_), notes))
    return block("Contents", *parts)


def _quality(quality: Mapping[str, Any]) -> str:
    about = quality["dimensions"]
    faults = [(name, fault, one["rows"], share(one["rows"], quality["rows"])) for name, dimension in about.items()
              for fault, one in dimension["faults"].items()]  # fmt: skip
    figures = [(name, figure, value) for name, one in about.items() for figure, value in one["figures"].items()]
    warned = [(one["dimension"], one["figure"], one["value"], f"at {one['kind']} {one['limit']:g}", one["why"])
              for one in quality["warnings"]]  # fmt: skip
    method = quality["method"]
    exact = "exactly" if method["distinct_exact"] else "from a sample of prompts"
    return block(
        "Quality", table(("dimension", "score"), [(name, one["score"]) for name, one in about.items()]),
        f"A score is the share of rows without a fault; of diversity the share of different prompts, counted {exact}.",
        table(("out of bounds", "figure", "value", "asked", "why"), warned) if warned else "Nothing is out of bounds.",
        table(("dimension", "fault", "rows", "share"), faults), table(("", "figure", "value"), figures),
    )  # fmt: skip


def _made(manifest: Mapping[str, Any]) -> str:
    inputs = table(("file", "sha256"), [(one["file"], one["sha256"]) for one in manifest["inputs"]])
    recipe = {name: manifest[name] for name in ("sources", "steps", "seed", "bad_rows")}
    output = manifest["output"]
    versions = {name: manifest[name] for name in ("luthier", "code", "key") if name in manifest}
    return block(
        "How it was made", "`luthier data build` with these sources and steps gives these bytes again.",
        "```json\n" + json.dumps(recipe, indent=1, ensure_ascii=False, sort_keys=True).replace("```", "'''") + "\n```",
        inputs, table(("", ""), [*versions.items(), *((f"output {name}", value) for name, value in output.items())]),
    )  # fmt: skip


def _samples(samples: Sequence[Item]) -> list[str]:
    if not samples:
        return []
    made = []
    for item in samples:
        asked, said = shown(item.record)
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", asked + said)), default=0))
        made.append(f"{inline(str(item.record.source))}\n\n{fence}text\n{asked}\n\n>>> {said}\n{fence}")
    return [block("Rows", *made)]


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(
        f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    )
