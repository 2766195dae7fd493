"""Tool calls in templates written here: where a call ends by itself, behind a tag, at the end of a conversation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data.families import SOURCE, STRINGS, tokenizer_for, trained
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat
from luthier.data.mask import Masker
from luthier.data.template import Template

_CALL = "{% for c in m.tool_calls or [] %}{{ %s }}{% endfor %}"
_ASKS = "{% if not loop.last or add_generation_prompt %}<|bot|>{% endif %}"
_JSON = "c.function.name + c.function.arguments | tojson"
# the result stands in the assistant's turn, a call ends with a token of its own, the turn ends before a question
INSIDE = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first %}<|/bot|>{% endif %}<|user|>{{ m.content }}"
    "<|/user|>" + _ASKS + "{% elif m.role == 'tool' %}[{{ m.content }}]{% else %}{{ m.content }}{% if m.tool_calls %}"
    "<|calls|>" + _CALL.replace("%s", _JSON) + "<|/calls|>{% endif %}{% endif %}{% endfor %}"
)
# no closing token: a turn ends where the next role's tag begins, and the tag of a result is not that of a question
TAGS = (
    "{% for m in messages %}{{ {'tool': '<|seen|>', 'user': '<|user|>', 'assistant': '<|assistant|>'}[m.role] }}\n"
    "{{ m.content | trim }}"
    + _CALL.replace("%s", "'<call>' + " + _JSON + " + '</call>'")
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# words of a turn with a call stand behind it, in a turn of their own
BEHIND = (
    "{% for m in messages %}{% if m.tool_calls %}<|bot|>" + _CALL.replace("%s", _JSON) + "{{ eos_token }}{% endif %}"
    "{% if m.role == 'assistant' and m.content %}<|bot|>{{ m.content + eos_token }}{% elif m.role != 'assistant' %}"
    "{{ '<|seen|>' if m.role == 'tool' else '<|user|>' }}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
# the first call of a turn only
FIRST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}"
    "{% set c = m.tool_calls[0] %}{{ " + _JSON + " }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _call(city: str) -> dict[str, Any]:
    return {"type": "function", "id": f"id-{city}", "function": {"name": "warmth", "arguments": {"city": city}}}


def _chat(*messages: tuple[str, str] | tuple[str, str, list[dict[str, Any]]]) -> Chat:
    made: list[dict[str, Any]] = []
    for role, content, *calls in messages:
        made.append({"role": role, "content": content, **({"tool_calls": calls[0]} if calls else {})})
    return Chat(made, SOURCE)


def _masker(text: str, name: str = "mine") -> Masker:
    template = Template(text, STRINGS, name)
    return Masker(template, tokenizer_for(template))


OSLO = 'warmth{"city": "Oslo"}'
ASKED, CALLED, SEEN = ("user", "How warm?"), ("assistant", "", [_call("Oslo")]), ("tool", "RESULT4")
ROWS = {
    "answered": [ASKED, CALLED, SEEN, ("assistant", "Four.")],
    "called last": [ASKED, CALLED],
    "asked again": [ASKED, CALLED, SEEN, ("assistant", "Four."), ("user", "Sure?"), ("assistant", "Yes.")],
}
GOLD = {
    ("inside", "answered"): [f"<|calls|>{OSLO}<|/calls|>", "Four.<|/bot|>"],
    ("inside", "called last"): [f"<|calls|>{OSLO}<|/calls|>"],
    ("inside", "asked again"): [f"<|calls|>{OSLO}<|/calls|>", "Four.<|/bot|>", "Yes.<|/bot|>"],
    ("tags", "answered"): [f"<call>{OSLO}</call><|seen|>", "Four.<|user|>"],
    ("tags", "called last"): [f"<call>{OSLO}</call><|seen|>"],
    ("tags", "asked again"): [f"<call>{OSLO}</call><|seen|>", "Four.<|user|>", "Yes.<|user|>"],
    ("behind", "answered"): [f"{OSLO}<EOS>", "Four.<EOS>"],
    ("behind", "called last"): [f"{OSLO}<EOS>"],
    ("behind", "asked again"): [f"{OSLO}<EOS>", "Four.<EOS>", "Yes.<EOS>"],
}
TEMPLATES = {"inside": INSIDE, "tags": TAGS, "behind": BEHIND}


@pytest.mark.parametrize(("name", "row"), sorted(GOLD))
def test_a_call_trains_to_its_own_end(name: str, row: str) -> None:
    masker = _masker(TEMPLATES[name])
    masked = masker.mask(_chat(*ROWS[row]))
    assert trained(masked) == GOLD[name, row]
    last = [int(np.flatnonzero(masked.encoded.inside(turn.start, turn.end))[-1]) for turn in masked.turns]
    assert all(int(masked.encoded.ids_T[i]) in masker.stop_ids for i in last), "inference stops where training did"


def test_words_behind_a_call_are_refused_and_before_it_are_not() -> None:
    spoken = _chat(ASKED, ("assistant", "Let me look.", [_call("Oslo")]), SEEN, ("assistant", "Four."))
    with pytest.raises(DataError, match=r"words of message 1 as a turn of their own behind its call .* take them out"):
        _masker(BEHIND).mask(spoken)
    assert trained(_masker(INSIDE).mask(spoken))[0] == f"Let me look.<|calls|>{OSLO}<|/calls|>"


def test_a_template_of_one_call_a_turn_says_so() -> None:
    both = _chat(ASKED, ("assistant", "", [_call("Oslo"), _call("Bergen")]), SEEN, ("assistant", "Both."))
    with pytest.raises(DataError, match=r"drops a tool call's .* one call a turn: write each call as a turn"):
        _masker(FIRST).mask(both)
    refusing = FIRST.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.tool_calls | default([]) | length > 1 %}{{ raise_exception('single!') }}"
        "{% endif %}",
    )
    with pytest.raises(DataError, match=r"saw single! .* one call a turn"):
        _masker(refusing).mask(both)


REFUSING = (
    "{% for m in messages %}{% if m.role not in ROLES %}{{ raise_exception('Conversation roles must alternate') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEEDS_TOOLS = "{% for t in tools %}{{ t.function.name }}{% endfor %}" + FIRST


@pytest.mark.parametrize(
    ("text", "row", "remedy"),
    [
        (REFUSING.replace("ROLES", "['user', 'assistant']"), ROWS["answered"], "no place for these tool turns"),
        (
            REFUSING.replace("ROLES", "['user', 'assistant']"), [("system", "S"), ASKED, ("assistant", "Four.")],
            "takes no system prompt: write it at the start of the first user message",
        ),
        (NEEDS_TOOLS, [ASKED, ("assistant", "Four.")], "it is a template for rows with tools"),
        (REFUSING.replace("ROLES", "[]"), [ASKED, ("assistant", "Four.")], "change the rows, or give another template"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_to_do(text: str, row: list[Any], remedy: str) -> None:
    with pytest.raises(DataError) as caught:
        _masker(text, "the-template").mask(_chat(*row))
    assert remedy in caught.value.line() and "rows.jsonl:7 (the-template)" in caught.value.line()
