"""Values of a template's own variables: in its text, equal to passing them, refused where they say nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from data.families import STRINGS
from luthier.contracts.errors import DataError
from luthier.data.fixed_variables import fixed
from luthier.data.keep_reasoning import SWITCHES
from luthier.data.template import Template, in_parts

USER = [{"role": "user", "content": "Hi"}]
TALK = [*USER, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "How?"}]
SHOWN = "{{ x is defined }} {{ x }}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (False, "True False"), (3, "True 3"), (0.5, "True 0.5"), ('it\'s {%x%} #} "q"\n', 'True it\'s {%x%} #} "q"\n'),
        (["a", {"b": [True, None]}], "True ['a', {'b': [True, None]}]"), (None, "False "),
    ],
)  # fmt: skip
def test_a_value_is_the_templates_default_and_a_request_has_the_last_word(value: Any, text: str) -> None:
    made = fixed(Template(SHOWN, {}, "t"), {"x": value})
    assert made.render(USER) == text
    assert made.render(USER, x="mine") == "True mine"


def test_the_first_line_of_the_template_stays() -> None:
    for text in ("\n  {{ x }}\n", "{% if x %}\nyes{% endif %}", " {%- if x %} y{% endif %}"):
        assert fixed(Template(text, {}, "t"), {"x": 1}).render(USER) == Template(text, {}, "t").render(USER, x=1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"enable_thinkin": True}, "did you mean `enable_thinking`"), ({"zzz": 1}, "it reads enable_thinking"),
        ({"messages": []}, "does not read"), ({"bos_token": "x"}, "does not read"),
        ({"enable_thinking": float("inf")}, "finite"), ({"enable_thinking": Path("x")}, "not a value"),
    ],
)  # fmt: skip
def test_what_would_change_nothing_is_refused_in_one_line(given: dict[str, Any], said: str) -> None:
    text = "{{ bos_token }}{% if enable_thinking is defined and not enable_thinking %}x{% endif %}{{ messages }}"
    with pytest.raises(DataError, match=said) as refusal:
        fixed(Template(text, STRINGS, "t"), given)
    assert "model.template_variables." in refusal.value.line() and "\n" not in refusal.value.line()


def test_both_texts_of_a_template_get_it() -> None:
    made = fixed(Template("{{ x }}", {}, "t", tool_use="tools {{ x }}"), {"x": 1})
    assert (made.render(USER), made.render(USER, [{"type": "function"}])) == ("1", "tools 1")
    assert made.variables == {"x": 1}


def test_real_templates_render_as_transformers_with_the_variable_passed(shared_data: Callable[[str], Path]) -> None:
    tried = 0
    for path in sorted(shared_data("chat_templates").glob("*.jinja")):
        template = Template(path.read_text("utf-8"), STRINGS, path.name)
        for given in [*SWITCHES, {"enable_thinking": False}]:
            if not set(given) <= template.reads:
                continue
            for messages in (TALK, in_parts(TALK)):
                try:
                    (theirs,), _ = render_jinja_template(
                        [messages], chat_template=template.text, add_generation_prompt=True, **STRINGS, **given
                    )
                except Exception:  # noqa: BLE001 the template refuses this form
                    continue
                assert fixed(template, given).render(messages, add_generation_prompt=True) == theirs
                tried += 1
                break
    assert tried >= 20
