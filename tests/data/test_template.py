"""The template: sandbox, caps, errors by name, control strings, marks."""

from __future__ import annotations

from datetime import datetime

import pytest

from data.families import CHATML, STRINGS, TEMPLATES, template, tokenizer_for
from luthier.contracts.errors import DataError
from luthier.data.provenance import NotTraceable, trace
from luthier.data.template import Template, open_template

USER = [{"role": "user", "content": "Hi"}]


def test_renders_with_the_settings_of_transformers() -> None:
    text = (
        "{%- for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n"
        "{{ m.content | tojson }}\n{% endfor %}"
    )
    made = Template(text, {}, "t").render([*USER, {"role": "user", "content": "<é'>"}])
    assert made == '"<é\'>"\n'


@pytest.mark.parametrize(
    ("text", "saw"),
    [
        ("{% for m in messages %}", "does not parse"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages[7]['role'] }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(_x=1) %}", "cannot hold the name"),
        ("{{ 'x' * 10000000000 }}", "repetition too long"),
        ("{{ 9 ** 999999999 }}", "power too large"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "fails"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses"),
        ("{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", "renders more than"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("x" * (1 << 21), "too long"),
    ],
)
def test_hostile_and_broken_templates_are_one_line_with_the_name(text: str, saw: str) -> None:
    with pytest.raises(DataError) as caught:
        Template(text, STRINGS, "bad.jinja").render(USER)
    line = caught.value.line()
    assert saw in line and "bad.jinja" in line and "\n" not in line


def test_control_strings_are_read_from_text_constants_and_renders() -> None:
    text = (
        "{# <|comment|> #}<|static|>{% if false %}{{ '<|constant|>' }}{% endif %}{% for m in messages %}"
        "{{ '<|' + m.role + '|>' }}{{ m.content }}{% endfor %}"
    )
    assert Template(text, STRINGS, "t").control_strings() == (
        "<|assistant|>", "<|constant|>", "<|static|>", "<|system|>", "<|user|>",
    )  # fmt: skip


def test_the_date_is_fixed_when_the_template_is_made() -> None:
    made = Template("{{ strftime_now('%d %B %Y') }}", {}, "t", now=datetime(2024, 7, 26))  # noqa: DTZ001 - as printed
    assert made.render(USER) == "26 July 2024"


def test_named_templates_and_overrides(tmp_path) -> None:  # type: ignore[no-untyped-def]
    tokenizer = tokenizer_for(template("chatml"))
    named = open_template({"default": "plain", "tool_use": "with tools"}, tokenizer)
    assert named is not None
    assert (named.render(USER), named.render(USER, [{"type": "function"}])) == ("plain", "with tools")
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML)
    opened = open_template(None, tokenizer, str(path))
    assert opened is not None and opened.name == "mine.jinja" and opened.special["eos_token"] == tokenizer.eos_token
    with pytest.raises(DataError, match="no such chat template"):
        open_template(None, tokenizer, "absent.jinja")
    with pytest.raises(DataError, match="none of them `default`"):
        open_template({"rag": "x"}, tokenizer)
    tokenizer.chat_template = None
    assert open_template(None, tokenizer) is None


def test_marks_bracket_generation_blocks_and_leave_no_other_trace() -> None:
    made = Template(TEMPLATES["marked"], STRINGS, "t")
    row = [*USER, {"role": "assistant", "content": "One."}]
    plain = made.render(row)
    marked = made.render(row, marks=("⟦", "⟧"))
    assert "⟦One.<|im_end|>⟧" in marked and marked.replace("⟦", "").replace("⟧", "") == plain
    found = trace(made, row)
    assert [found.text[slice(*block)] for block in found.generated] == ["One.<|im_end|>"]


def test_private_use_characters_in_content() -> None:
    made = template("chatml")
    for letter in ("\ue000", "\U000f0000", "\U00100000"):
        row = [{"role": "user", "content": f"a{letter}b é"}, {"role": "assistant", "content": "c"}]
        assert [found.kind for found in trace(made, row).spans] == ["content", "content"]
    every = [{"role": "user", "content": "\ue000\U000f0000\U00100000"}]
    with pytest.raises(NotTraceable, match="private-use"):
        trace(made, every)
