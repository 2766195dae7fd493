"""The short ways of templates and tokenising give what the long ways give: renders, masks, refusals and reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.families import STRINGS, TEMPLATES, template, tokenizer_for
from data.test_template_collection import CHATS, TOOL
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Source
from luthier.data.mask import Masker
from luthier.data.sandbox import QuickSandbox
from luthier.data.template import Template

Answer = tuple[str, Any]


class Twins:
    """One template with the short ways and without them."""

    def __init__(self, made: Template) -> None:
        tokenizer = tokenizer_for(made)
        self.quick, self.plain = Masker(made, tokenizer), Masker(made, tokenizer)
        self.plain.vocabulary.__dict__["quick"] = None
        assert self.quick.vocabulary.quick is not None

    def compare(self, chat: Chat) -> str:
        quick = answer(self.quick, chat)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(QuickSandbox, "getattr", ImmutableSandboxedEnvironment.getattr)
            patch.setattr(QuickSandbox, "call", ImmutableSandboxedEnvironment.call)
            plain = answer(self.plain, chat)
        assert quick == plain, self.quick.template.name
        return quick[0]


def answer(masker: Masker, chat: Chat) -> Answer:
    try:
        made = masker.mask(chat)
    except DataError as error:
        return "refused", error.line()
    encoded = made.encoded
    arrays = (encoded.ids_T, made.weights_T, encoded.start_T, encoded.end_T)
    return "masked", (encoded.text, [np.asarray(a).tolist() for a in arrays], made.turns, made.escaped)


@pytest.fixture(scope="module")
def families() -> dict[str, Twins]:
    return {name: Twins(template(name)) for name in TEMPLATES}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_families_on_all_chats(name: str, families: dict[str, Twins]) -> None:
    said = [
        families[name].compare(Chat(messages, Source(chat, 1), [TOOL] if chat == "tools" else None))
        for chat, messages in CHATS.items()
    ]
    assert "masked" in said


def test_the_collection_on_all_chats(shared_data: Callable[[str], Path]) -> None:
    said = []
    for path in sorted(shared_data("chat_templates").glob("*.jinja"))[::3]:
        twins = Twins(Template(path.read_text(encoding="utf-8"), STRINGS, path.stem))
        for chat, messages in CHATS.items():
            said.append(twins.compare(Chat(messages, Source(chat, 1), [TOOL] if chat == "tools" else None)))
    assert said.count("masked") > 100 and "refused" in said


CONTENT = st.text("aZ .\n<|>/é中🙂_7", max_size=12) | st.sampled_from(
    ["<|im_end|>", "</think>x", "<think>\nr\n</think>\n\na", "<tool_response>x</tool_response>", " padded ", ""]
)
ROLES = st.sampled_from(["system", "user", "assistant", "assistant", "user", "tool"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(ROLES, CONTENT, CONTENT), min_size=1, max_size=6))
def test_random_conversations(families: dict[str, Twins], name: str, turns: list[tuple[str, str, str]]) -> None:
    messages: list[dict[str, Any]] = [
        {"role": role, "content": content} | ({"reasoning_content": thought} if thought[:1] == "a" else {})
        for role, content, thought in turns
    ]
    assert families[name].compare(Chat(messages, Source("random.jsonl", 3))) in ("masked", "refused")


def _expressions() -> Iterator[str]:
    yield from [
        "{{ m.role }}", "{{ m.absent }}", "{{ m.absent.more }}", "{{ m.items }}", "{{ m.items() | list }}",
        "{{ m['role'] }}", "{{ m.update({}) }}", "{{ m.pop('role') }}", "{{ m.get('role') }}", "{{ m.keys() | list }}",
        "{{ m.__class__ }}", "{{ m.content.strip().upper() }}", "{{ m.content.format(1) }}", "{{ '{}'.format(m) }}",
        "{{ m.content.format_map(m) }}", "{{ m.content.split('.')[0].lstrip('H') }}", "{{ m.content.__len__() }}",
        "{{ m.content.encode() }}", "{{ m.content.startswith('H') }}", "{{ m.content.startswith(prefix='H') }}",
        "{{ m.content.index('?') }}", "{{ m.content.nothing }}", "{{ m.content.join(['a']) }}",
        "{% for x in [1, 2] %}{{ loop.index }}{{ loop.last }}{{ loop.nextitem }}{{ loop.cycle(1, 2) }}{% endfor %}",
        "{% for x in [1] %}{{ loop.absent }}{{ loop._iterator }}{% endfor %}",
        "{% set n = namespace(a=1, f='x'.strip) %}{{ n.a }}{{ n.b }}{{ n.f() }}{{ n._x }}",
        "{% set n = namespace(f='{}'.format) %}{{ n.f(m) }}", "{{ [].append(1) }}", "{{ [1].count(1) }}",
        "{% for x in 'a b'.split() %}{% set y = x.strip() %}{{ y }}{% endfor %}", "{{ m.nested.role }}",
    ]  # fmt: skip


@pytest.mark.parametrize("text", list(_expressions()))
def test_expressions(text: str) -> None:
    message = {"role": "user", "content": " Hello. {role} ", "nested": {"role": "x"}, "_own": 1}
    said: list[str] = []
    for plain in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(QuickSandbox, "getattr", ImmutableSandboxedEnvironment.getattr)
                patch.setattr(QuickSandbox, "call", ImmutableSandboxedEnvironment.call)
            try:
                made = Template("{% set m = messages[0] %}" + text, STRINGS, "probe")
                said.append(made.render([message]))
            except DataError as error:
                said.append(error.line())
    assert said[0] == said[1]
