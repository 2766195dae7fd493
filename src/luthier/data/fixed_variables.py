"""A chat template's own variables (enable_thinking, reasoning_effort, ...), given a value inside the template's text.

    {%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %} … the template as it was

Written there, the value belongs to what is trained, checked, saved as chat_template.jinja and fed at inference, here
and in every engine that renders the file; who passes the variable with a request still has the last word. A name that
the template never reads is refused: it would change nothing while seeming to.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.contracts.errors import DataError
from luthier.data.template import Template

WHERE = "model.template_variables"
_OURS = frozenset(["messages", "tools", "documents", "add_generation_prompt"])


def fixed(template: Template, variables: Mapping[str, Any]) -> Template:
    """The template with these values as its defaults. DataError for a name it does not read, or a value it cannot hold.

    Null says nothing: the variable stays undefined, as it was.
    """
    given = {name: value for name, value in variables.items() if value is not None}
    if not given:
        return template
    known = template.reads - _OURS - set(template.special)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            listed = f"it reads {', '.join(sorted(known))}" if known else "it reads none"
            raise DataError(
                "the chat template does not read this variable", where=f"{WHERE}.{name}", value=given[name],
                remedy=f"did you mean `{close[0]}`?" if close else listed,
            )  # fmt: skip
    head = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(name, value)} %}}{{%- endif %}}"
        for name, value in given.items()
    )
    head += "{{- '' }}"  # the template's own first line stays as it is
    tool_use = None if template.tool_use is None else head + template.tool_use
    return replace(template, text=head + template.text, tool_use=tool_use, variables={**template.variables, **given})


def _literal(name: str, value: Any) -> str:
    """As Jinja writes it: JSON, with its own word for null."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_literal(name, str(key))}: {_literal(name, item)}" for key, item in value.items())
        return f"{{{inside}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_literal(name, item) for item in value)}]"
    if value is None:
        return "none"
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError("a template variable must be finite", where=f"{WHERE}.{name}", value=value)
    if not isinstance(value, bool | int | float | str):
        raise DataError("not a value for a template", where=f"{WHERE}.{name}", value=type(value).__name__,
                        remedy="use text, numbers, true, false, lists and mappings of these")  # fmt: skip
    return json.dumps(value)
