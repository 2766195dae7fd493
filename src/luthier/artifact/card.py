"""README.md of an adapter or a tuned model, from facts that the run hands over. Torch-free, no network.

The front matter is what the hub reads; strings are quoted as JSON, which YAML reads, so no name of a data file
can break out of it. Only facts that are given are printed; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What is known about the run."""

    base: str  # path or hub id of the base model
    method: str
    objective: str = "sft"
    adapter: bool = True  # False: a whole model
    method_fields: Mapping[str, Any] = field(default_factory=dict)
    data: Sequence[str] = ()  # one line per source, e.g. "chats.jsonl: 1,000 rows, 12 dropped"
    results: Mapping[str, Any] = field(default_factory=dict)  # e.g. {"steps": 100, "final loss": 1.23}
    scores: bool = False  # a reward model: it scores answers and writes none
    peft: bool = True  # PEFT can read the adapter
    base_format: str = "none"  # the format that the base was stored in
    base_start: str = ""  # the start that was taken off before it was packed
    version: str = ""
    recipe: str = ""  # the resolved recipe, YAML


def card(facts: CardFacts) -> str:
    """The README as text."""
    parts = [_front(facts), f"# {facts.method} of {_inline(facts.base)}", _summary(facts)]
    if facts.method_fields:
        parts.append(_table("Method", facts.method_fields))
    if facts.data:
        parts.append("## Data\n\n" + "\n".join(f"- {_inline(line)}" for line in facts.data))
    if facts.results:
        parts.append(_table("Results", facts.results))
    parts.append(_use(facts))
    if facts.adapter and facts.base_format != "none":
        parts.append(_stored(facts))
    if facts.recipe:
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", facts.recipe)), default=0))
        parts.append(f"## Recipe\n\n{fence}yaml\n{facts.recipe.rstrip()}\n{fence}")
    return "\n\n".join(parts) + "\n"


def _front(facts: CardFacts) -> str:
    library = "peft" if facts.adapter and facts.peft else "luthier" if facts.adapter else "transformers"
    lines = [
        f"base_model: {json.dumps(facts.base)}",
        f"library_name: {library}",
        f"pipeline_tag: {'text-classification' if facts.scores else 'text-generation'}",
        f"tags: {json.dumps(['luthier', facts.method, facts.objective, *(['reward-model'] if facts.scores else [])])}",
    ]
    return "\n".join(["---", *lines, "---"])


def _summary(facts: CardFacts) -> str:
    what = "An adapter for" if facts.adapter else "A model tuned from"
    if facts.scores:
        what = "An adapter that makes a reward model of" if facts.adapter else "A reward model from"
    by = f"luthier {facts.version}".strip()
    return f"{what} {_inline(facts.base)}: method `{facts.method}`, objective `{facts.objective}`, trained with {by}."


def _table(title: str, facts: Mapping[str, Any]) -> str:
    rows = [f"| {_inline(str(name))} | {_inline(_short(value))} |" for name, value in facts.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *rows])


def _use(facts: CardFacts) -> str:
    if facts.scores:
        return _use_of_scores(facts)
    if not facts.adapter:
        return "## Use\n\nLoad the directory with transformers, or `luthier chat DIRECTORY`."
    if not facts.peft:
        return "## Use\n\n`luthier chat DIRECTORY`, or `luthier merge DIRECTORY --out MODEL` where the method can."
    base = json.dumps(facts.base)
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), DIRECTORY)"
    )
    return f"## Use\n\n`luthier chat DIRECTORY`, `luthier merge DIRECTORY --out MODEL`, or\n\n```python\n{code}\n```"


def _stored(facts: CardFacts) -> str:
    """Which base the numbers belong to, and what the adapter is on another."""
    lines = [f"## The base\n\nTrained on the base stored in `{facts.base_format}`: luthier opens it so again."]
    if facts.base_start:
        lines.append(
            f"That base was packed after the adapter's start (`{facts.base_start}`) was taken off its matrices, and "
            "has it added again; luthier makes it anew from the dense files and this adapter. The tensors here are the "
            "change since that start, as a plain adapter of twice the rank."
        )
    lines.append(
        "On the base in another format the adapter computes nearly the same, not the same: "
        "`luthier merge DIRECTORY --out MODEL --into dense` (or `--into quantised`) measures how far they are apart."
    )
    return " ".join(lines)


def _use_of_scores(facts: CardFacts) -> str:
    base = json.dumps(facts.base) if facts.adapter else "DIRECTORY"
    code = [
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n",
        'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")',
        f"model = AutoModelForSequenceClassification.from_pretrained({base}, num_labels=1)",
        "model.config.pad_token_id = tokenizer.pad_token_id  # the score is read at the last other token",
    ]
    code = [line.replace("(DIRECTORY", '("DIRECTORY"') for line in code]
    if facts.adapter and facts.peft:
        code[0] = "from peft import PeftModel\n" + code[0]
        code.append('model = PeftModel.from_pretrained(model, "DIRECTORY")')
    code.append(
        "score = model(**tokenizer.apply_chat_template(messages, return_tensors='pt', return_dict=True)).logits[0, 0]"
    )
    merge = ", `luthier merge DIRECTORY --out MODEL`" if facts.adapter else ""
    rank = f"`luthier evaluate DIRECTORY --on PAIRS`{merge}"
    what = "A reward model: it gives a conversation that ends with an answer one score, and writes nothing itself."
    if facts.adapter and not facts.peft:
        return f"## Use\n\n{what} {rank}."
    block = "\n".join(code)
    return f"## Use\n\n{what} {rank}, or\n\n```python\n{block}\n```"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _inline(text: str) -> str:
    """One line, safe in a table and in a heading."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
