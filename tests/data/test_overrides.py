"""Overrides: what is mended and why is said, inference sees the same text, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from data.families import SOURCE, STRINGS, TEMPLATES, chat, tokenizer_for, trained
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat
from luthier.data.encode import Encoder
from luthier.data.mask import Masker
from luthier.data.overrides import overridden
from luthier.data.template import Template

NO_STOP = (
    "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{{ '### ' + m['role'] | capitalize + ':\n' + m['content'] | trim + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
LATE_SYSTEM = (
    '{%- if messages[0]["role"] == "system" %}\n{%- set system_message = messages[0]["content"] %}\n'
    "{%- set loop_messages = messages[1:] %}\n{%- else %}\n{%- set loop_messages = messages %}\n{%- endif %}\n"
    "{{- bos_token }}\n{%- for message in loop_messages %}\n{%- if message.role == 'user' %}\n"
    '{%- if loop.last and system_message is defined %}\n{{- "[INST]" + system_message + "\\n\\n" }}\n{%- else %}\n'
    '{{- "[INST]" }}\n{%- endif %}\n{{- message.content + "[/INST]" }}\n{%- else %}\n'
    "{{- message.content + eos_token }}\n{%- endif %}\n{%- endfor %}"
)
SYSTEM = [{"role": "system", "content": "Be brief."}]
MASK = SimpleNamespace(
    roles=("assistant",), last_turn_only=False, thinking="as_template", train_generation_prompt=False
)
SECTION = SimpleNamespace(mask=MASK, max_tokens=2048, overlong="drop", injection="escape")


def _template(text: str, name: str = "mine") -> Template:
    return Template(text, STRINGS, name)


def _masker(template: Template) -> Masker:
    return Masker(template, tokenizer_for(template))


def test_a_template_without_a_stop_gets_one_after_each_answer() -> None:
    row = chat("Q1", "One.", "Q2", "Two.")
    with pytest.raises(DataError, match="no stop token follows message 1"):
        _masker(_template(NO_STOP)).mask(row)
    mended = overridden(_template(NO_STOP))
    assert mended.override.startswith("append-stop: ") and "<EOS>" in mended.override
    assert trained(_masker(mended).mask(row)) == ["One.<EOS>", "Two.<EOS>"]
    plain = _template(NO_STOP)
    for messages in (row.messages, row.messages[:3], [*SYSTEM, *row.messages]):
        for prompt in (False, True):
            text = mended.render(messages, None, prompt)
            assert text.replace("<EOS>", "") == plain.render(messages, None, prompt)
            assert text.count("<EOS>") == sum(m["role"] == "assistant" for m in messages)
    assert overridden(mended).text == mended.text


def test_a_system_prompt_that_training_rows_would_lose_stands_before_the_last_question() -> None:
    row = Chat([*SYSTEM, *chat("Q1", "One.", "Q2", "Two.").messages], SOURCE)
    plain, mended = _template(LATE_SYSTEM), overridden(_template(LATE_SYSTEM))
    with pytest.raises(DataError, match=r"drops the content of message 0 \(system\)"):
        _masker(plain).mask(row)
    masked = _masker(mended).mask(row)
    assert masked.text == "<BOS>[INST]Q1[/INST]One.<EOS>[INST]Be brief.\n\nQ2[/INST]Two.<EOS>"
    assert trained(masked) == ["One.<EOS>", "Two.<EOS>"]
    for end in (2, 4):  # what inference feeds is what it always was, and begins the training row
        fed = plain.render(row.messages[:end], None, True)
        assert mended.render(row.messages[:end], None, True) == fed
    assert masked.text.startswith(plain.render(row.messages[:4], None, True))
    assert mended.override.startswith("system-prompt-in-training: ")
    assert overridden(mended).text == mended.text


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_other_templates_stay_as_they_are(name: str) -> None:
    template = _template(TEMPLATES[name], name)
    assert overridden(template) is template and not template.override


@pytest.mark.parametrize(
    "text",
    [
        NO_STOP.split("{% if add_generation_prompt")[0],  # nothing asks for an answer: no mask either way
        NO_STOP.replace("+ '\n\n'", "+ '\n\n' + ('[END]' if m['role'] == 'assistant' else '')"),
        NO_STOP.replace("{{ bos_token }}", "{% generation %}{% endgeneration %}"),
    ],
)
def test_a_stop_is_added_only_where_it_can_be_meant(text: str) -> None:
    assert not overridden(_template(text)).override
    assert not overridden(replace(_template(NO_STOP), special={})).override


@pytest.mark.parametrize("text", [NO_STOP, LATE_SYSTEM])
def test_the_mended_template_is_what_a_run_uses_and_everybody_renders_it(text: str) -> None:
    template = _template(text)
    encoder = Encoder(tokenizer_for(template), template, SECTION)
    assert encoder.template is not None and encoder.template.override
    row: list[dict[str, Any]] = [*SYSTEM, *map(dict, chat("Q1", "One.", "Q2", "Two.").messages)]
    for messages, prompt in ((row, False), (row[:4], True)):
        theirs = render_jinja_template(
            [messages], chat_template=encoder.template.text, add_generation_prompt=prompt, **STRINGS
        )[0][0]
        assert encoder.template.render(messages, None, prompt) == theirs
    assert any("chat template" in note and encoder.template.override in note for note in encoder.notes())


def test_what_the_collection_needs(shared_data: Callable[[str], Path]) -> None:
    needed: dict[str, str] = {}
    paths = sorted(shared_data("chat_templates").glob("*.jinja"))
    for path in paths:
        if said := overridden(_template(path.read_text(encoding="utf-8"), path.stem)).override:
            needed[path.stem] = said.split(":")[0]
    if len(paths) >= 108:
        assert {name: sorted(needed.values()).count(name) for name in set(needed.values())} == {
            "append-stop": 5, "system-prompt-in-training": 3, "without-workaround": 1, "tool-queue-without-append": 1,
        }  # fmt: skip
