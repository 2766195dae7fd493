"""Overrides: templates whose masks cannot be proven as they stand, mended where there is one right way to do it.

    by text        `templates/overrides.json`: a template that holds all strings of `contains` gets its replacements
    by structure   a template that prints no control string after an answer gets `eos_token` written after each one

The mended template is the run's template: rows are trained on its text, inference renders with it and it is saved
beside the weights, so nothing differs between the two. An override is never silent: `Template.override` carries its
name and reason into the notes of a run, `luthier data show` and `luthier data check`.

Leaves out: whatever would be an invention (a form for tool calls that the family never had, a system prompt for a
family without one): those rows are refused with what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

from luthier.contracts.errors import DataError
from luthier.data import templates
from luthier.data.provenance import NotTraceable
from luthier.data.template import MARKUP, Template
from luthier.data.turn_habits import around

# answers get their stop before the template sees them; `''` at the end keeps the template's own first line as it is
_APPEND_STOP = (
    "{%- set luthier = namespace(messages=[]) %}{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' and message['content'] is string %}"
    "{%- set luthier.messages = luthier.messages + [dict(message, content=message['content'] + eos_token)] %}"
    "{%- else %}{%- set luthier.messages = luthier.messages + [message] %}{%- endif %}{%- endfor %}"
    "{%- set messages = luthier.messages %}{{- '' }}"
)
_USER = {"role": "user", "content": "probe one"}
_ANSWER = {"role": "assistant", "content": "probe two"}


def overridden(template: Template) -> Template:
    """The template, mended where an override knows it; `override` of the result says which and why."""
    said = []
    for rule in _rules():
        text = _replaced(template.text, rule)
        tool_use = None if template.tool_use is None else _replaced(template.tool_use, rule)
        if (text, tool_use) != (template.text, template.tool_use):
            template = replace(template, text=text, tool_use=tool_use)
            said.append(f"{rule['name']}: {rule['reason']}")
    if _has_no_stop(template):
        template = replace(template, text=_APPEND_STOP + template.text)
        said.append(
            "append-stop: the template prints nothing that ends an answer, so a model would never learn to stop; "
            f"{template.special['eos_token']} is written after each answer"
        )
    return replace(template, override="; ".join(said)) if said else template


@cache
def _rules() -> Sequence[Mapping[str, Any]]:
    rules: Sequence[Mapping[str, Any]] = json.loads((files(templates) / "overrides.json").read_text(encoding="utf-8"))
    return rules


def _replaced(text: str, rule: Mapping[str, Any]) -> str:
    """The text after the rule: unchanged unless it holds all that the rule looks for and every replaced string."""
    olds = [old for old, _ in rule["replace"]]
    if not all(part in text for part in (*rule["contains"], *olds)):
        return text
    for old, new in rule["replace"]:
        text = text.replace(old, new)
    return text


def _has_no_stop(template: Template) -> bool:
    """Whether answers are followed by plain text only, in history and at the end, while a prompt asks for them."""
    eos = template.special.get("eos_token")
    if template.has_markers or not eos or template.tool_use is not None:
        return False
    try:
        asked = around(template, [_USER], None, prompt=False)[1]
        prompted = around(template, [_USER], None, prompt=True)[1]
        last = around(template, [_USER, _ANSWER], None, prompt=False)[1]
        history = around(template, [_USER, _ANSWER, _USER], None, prompt=False)[0]
    except (DataError, NotTraceable):
        return False
    printed = (asked, prompted, last, history)
    known = [value for value in template.special.values() if value]
    if any(MARKUP.search(text) or any(value in text for value in known) for text in printed):
        return False
    return bool(prompted.strip()) and prompted.strip() != asked.strip()
