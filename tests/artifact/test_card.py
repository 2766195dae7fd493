"""The card: front matter that YAML reads, only given facts, nothing that breaks out of its line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import yaml

import luthier
from luthier.artifact.card import CardFacts, card

FACTS = CardFacts(
    base="org/base",
    method="lora",
    method_fields={"r": 16, "target_modules": "all-linear"},
    data=["chats.jsonl: 1,000 rows, 12 dropped"],
    results={"steps": 100, "final loss": 1.23456789},
    version="0.1.0",
    recipe="model: org/base\nmethod: lora\n",
)


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter() -> None:
    assert front(card(FACTS)) == {
        "base_model": "org/base", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["luthier", "lora", "sft"],
    }  # fmt: skip


def test_given_facts_are_there_and_no_others() -> None:
    text = card(FACTS)
    for part in ("| r | 16 |", "chats.jsonl: 1,000 rows", "| final loss | 1.23457 |", "luthier 0.1.0", "method: lora"):
        assert part in text
    bare = card(CardFacts(base="b", method="lora"))
    assert "## Data" not in bare and "## Results" not in bare and "## Recipe" not in bare


def test_it_says_which_base_the_numbers_belong_to() -> None:
    assert "## The base" not in card(FACTS)
    plain = card(replace(FACTS, base_format="nf4"))
    assert "stored in `nf4`" in plain
    assert "--into dense" in plain
    assert "twice the rank" not in plain
    started = card(replace(FACTS, base_format="nf4", base_start="pissa"))
    assert "(`pissa`) was taken off" in started
    assert "twice the rank" in started
    assert "## The base" not in card(replace(FACTS, base_format="nf4", adapter=False))


def test_a_whole_model_and_an_own_layout_say_how_to_load() -> None:
    assert front(card(CardFacts(base="b", method="full", adapter=False)))["library_name"] == "transformers"
    own = card(CardFacts(base="b", method="x", peft=False))
    assert front(own)["library_name"] == "luthier"
    assert "PeftModel" not in own


def test_hostile_names_stay_in_their_place() -> None:
    facts = CardFacts(
        base='x"\n---\nlicense: evil', method="lora", data=["a\n# heading <script>"], results={"a|b": "c\nd"},
        recipe="a: |\n  ```\n  b\n",
    )  # fmt: skip
    text = card(facts)
    assert front(text)["base_model"] == 'x"\n---\nlicense: evil'
    assert "\n# heading" not in text and "<script>" not in text
    assert "| a\\|b | c d |" in text
    assert "````yaml" in text


def test_the_card_needs_no_torch() -> None:
    code = "import sys, luthier.artifact.card; sys.exit('torch' in sys.modules)"
    place = {**os.environ, "PYTHONPATH": str(Path(luthier.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=place).returncode == 0
