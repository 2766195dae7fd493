"""`thinking: keep_all`: the template with the variable set by which it keeps the reasoning of earlier answers.

Families that leave reasoning out of history often have a switch for it, each with a name of its own. The first that
makes a small conversation show all of its reasoning is written into the template: rows, what inference is fed, and
the file that is saved.
Where no switch helps, the template stays as it is, and a row that loses reasoning is refused (mask.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.contracts.errors import DataError
from luthier.data.fixed_variables import fixed
from luthier.data.template import Template, in_parts

SWITCHES: tuple[Mapping[str, Any], ...] = (
    {"preserve_thinking": True}, {"keep_past_thinking": True}, {"clear_thinking": False},
    {"truncate_history_thinking": False}, {"enable_thinking": True}, {"thinking": True},
)  # fmt: skip
_THOUGHTS = ("probe why one", "probe why two")


def keeping(template: Template) -> Template:
    """The template that shows the most reasoning: itself where it keeps all, else with the first switch that does."""
    if _shown(template) == len(_THOUGHTS):
        return template
    for switch in SWITCHES:
        if set(switch) & set(template.variables):
            continue  # the recipe has its own word on it
        if not set(switch) <= template.reads:
            continue
        tried = fixed(template, switch)
        if _shown(tried) == len(_THOUGHTS):
            return tried
    return template


def _shown(template: Template) -> int:
    """How many of two answers show their reasoning, in the better of the two ways to write it."""
    return max(_count(template, in_content) for in_content in (False, True))


def _count(template: Template, in_content: bool) -> int:
    messages: list[dict[str, Any]] = []
    for thought in _THOUGHTS:
        answer: dict[str, Any] = {"role": "assistant", "content": "probe answer", "reasoning_content": thought}
        if in_content:
            answer = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\nprobe answer"}
        messages += [{"role": "user", "content": "probe question"}, answer]
    for shown in (messages, in_parts(messages)):
        try:
            text = template.render(shown)
        except DataError:
            continue
        return sum(thought in text for thought in _THOUGHTS)
    return 0
