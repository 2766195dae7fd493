"""A chat template: text in, text out, in the sandbox that transformers uses, so that both render the same bytes.

Settings are those of `transformers.utils.chat_template_utils`: immutable sandbox, trim_blocks, lstrip_blocks,
loop controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, and a `{% generation %}` block
that prints its body (and brackets it with marks when the caller asks). A template comes with somebody's model
directory, so it is capped: its size, the size of what it renders, `range`, and repetition by `*`.
`strftime_now` is fixed when the template is made: a run renders one row the same way on every day it takes.

Left out: `documents` and images. Values of a template's own variables are written into its text
(fixed_variables.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.contracts.errors import DataError
from luthier.data import templates
from luthier.data.sandbox import QuickSandbox

LONGEST_TEMPLATE = 1 << 20  # characters; the longest known is below 60,000
LONGEST_RENDER = 1 << 25
LONGEST_REPEAT = 1 << 20
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_REASONING = frozenset(REASONING_FIELDS)
_MARKS = "luthier_marks"  # render variable: (opening, closing) around each generation block
# what a special token can look like; `tokens.py` decides which of them must be atomic
MARKUP = re.compile(
    r"<\|[^<>|\s]{1,60}\|?>|<[A-Za-z_/]\w{0,60}\|>|<｜[^<>\n]{1,60}｜>|</?[A-Za-z_][\w:.\-]{0,60}>|\[/?[A-Z][A-Z_]{1,40}\]|\[gMASK\]"
    r"|\[\|[^\[\]|\s]{1,60}\|\]"
)


@dataclass(frozen=True)
class Template:
    """A compiled chat template. `special` are the tokenizer's strings: bos_token, eos_token, ...

    `tool_use` is the second text of a tokenizer that names two (`default` and `tool_use`): it renders the rows
    that have tools. `variables` are those that fixed_variables.py wrote into the text.
    """

    text: str
    special: Mapping[str, str] = field(default_factory=dict)
    name: str = "chat template"
    tool_use: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    now: datetime = field(default_factory=datetime.now)
    override: str = ""  # what overrides.py changed in the text, and why

    def __post_init__(self) -> None:
        compiled = [_compile(text, self.name, self.now) for text in (self.text, self.tool_use) if text is not None]
        object.__setattr__(self, "_compiled", compiled)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process as text; it is compiled there."""
        fields = (self.text, dict(self.special), self.name, self.tool_use, dict(self.variables), self.now)
        return partial(Template, override=self.override), fields

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if self.tool_use is None else (self.text, self.tool_use)

    @cached_property
    def has_markers(self) -> bool:
        """True where the template itself says what is trained, by `{% generation %}` blocks."""
        return all(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text) for text in self.texts)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        marks: tuple[str, str] | None = None,
        **variables: Any,
    ) -> str:
        """The text. `marks` are put around what generation blocks print. Raises DataError with the template's name."""
        compiled = getattr(self, "_compiled")  # noqa: B009 - set in __post_init__ of a frozen dataclass
        which = compiled[-1] if tools else compiled[0]
        shown = {**self.special, **variables}
        if marks is not None:
            shown[_MARKS] = marks
        parts: list[str] = []
        length = 0
        try:
            shown["messages"] = [_alias_reasoning(message) for message in messages]
            shown["tools"], shown["documents"] = list(tools) if tools else None, None
            shown["add_generation_prompt"] = add_generation_prompt
            for part in which.root_render_func(which.new_context(shown)):
                parts.append(part)
                length += len(part)
                if length > LONGEST_RENDER:
                    self._fail(f"renders more than {LONGEST_RENDER} characters", None)
        except DataError:
            raise
        except TemplateError as error:
            self._fail("refuses this conversation", error.message or str(error))
        except RecursionError:
            self._fail("recurses without end", None)
        except Exception as error:  # noqa: BLE001 - a template is foreign code: whatever it raises is its answer
            self._fail("fails on this conversation", f"{type(error).__name__}: {error}")
        return "".join(parts)

    @cached_property
    def reads(self) -> frozenset[str]:
        """Names that the template looks up in what a render is given."""
        trees = [_environment(self.now).parse(text) for text in self.texts]
        return frozenset().union(*(jinja2.meta.find_undeclared_variables(tree) for tree in trees))

    def control_strings(self) -> tuple[str, ...]:
        """Strings of the template that look like special tokens, sorted: read from its text and from probe renders.

        The template's own text and string constants are read from its syntax tree, so that comments and names do
        not count; strings put together while rendering (`'<|' + role + '|>'`) come from the probes.
        """
        found: set[str] = set()
        for text in self.texts:
            for constant in _constants(text, self.name):
                found.update(MARKUP.findall(constant))
        for text in self.probes():
            found.update(MARKUP.findall(text))
        return tuple(sorted(found))

    def probes(self) -> list[str]:
        """What the template makes of a few plain conversations; those that it refuses are left out."""
        made = []
        for messages in _PROBES:
            for prompt in (False, True):
                for shown in (messages, in_parts(messages)):
                    try:
                        made.append(self.render(shown, add_generation_prompt=prompt))
                    except DataError:
                        continue
                    break
        return made

    def _fail(self, what: str, detail: str | None) -> NoReturn:
        raise DataError(
            f"the chat template {what}", where=self.name, value=detail,
            remedy="change the rows, or give another template in model.chat_template",
        ) from None  # fmt: skip


def _probe(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


_PROBES = (
    _probe(("user", "probe one")),
    _probe(("user", "probe one"), ("assistant", "probe two")),
    _probe(("system", "probe nil"), ("user", "probe one"), ("assistant", "probe two"), ("user", "probe three")),
    _probe(("user", "probe one"), ("assistant", "probe two"), ("user", "probe three"), ("assistant", "probe four")),
)


def open_template(
    chat_template: str | Mapping[str, str] | None, tokenizer: Any, override: str | None = None, *,
    now: datetime | None = None,
) -> Template | None:  # fmt: skip
    """The template of a run: `override` (a file or the text itself), else the tokenizer's; None where there is none.

    `now` is what `strftime_now` prints, for a run that goes on another day.
    """
    found = _open(chat_template, tokenizer, override)
    return found if found is None or now is None else replace(found, now=now)


def _open(chat_template: str | Mapping[str, str] | None, tokenizer: Any, override: str | None) -> Template | None:
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    if override is not None:
        if "{" in override or "\n" in override:
            return Template(override, special, "model.chat_template")
        shipped = files(templates)
        if (named := shipped / f"{override}.jinja").is_file():
            return Template(named.read_text(encoding="utf-8"), special, override)
        path = Path(override)
        if not path.is_file():
            names = sorted(entry.name.removesuffix(".jinja") for entry in shipped.iterdir() if ".jinja" in entry.name)
            raise DataError(
                "no such chat template", where="model.chat_template", value=override,
                remedy=f"give a .jinja file, the template's text, or one that comes along: {', '.join(names)}",
            )  # fmt: skip
        return Template(path.read_text(encoding="utf-8"), special, path.name)
    if chat_template is None:
        chat_template = tokenizer.chat_template
    if not chat_template:
        return None
    name = f"chat template of {tokenizer.name_or_path or 'the tokenizer'}"
    if isinstance(chat_template, str):
        return Template(chat_template, special, name)
    if "default" not in chat_template:
        raise DataError(
            "the tokenizer names several chat templates, none of them `default`", where=name,
            value=sorted(chat_template), remedy="give one in model.chat_template",
        )  # fmt: skip
    return Template(chat_template["default"], special, name, tool_use=chat_template.get("tool_use"))


def in_parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with content as a list of one text part, the only form that some templates take."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in messages
    ]


def _alias_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers does: keys that are None are absent; reasoning is found under all of its names."""
    if type(message) is dict and _REASONING.isdisjoint(message) and None not in message.values():
        return message
    shown = {key: value for key, value in message.items() if value is not None}
    reasoning = next((shown[key] for key in REASONING_FIELDS if key in shown), None)
    if reasoning is not None:
        shown = {"thinking": reasoning, **shown, "reasoning_content": reasoning}
    return shown


class _Generation(jinja2.ext.Extension):
    """`{% generation %} body {% endgeneration %}`: prints the body, between the marks if a render gives them."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_bracket", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _bracket(self, context: jinja2.runtime.Context, caller: Any) -> str:
        marks = context.get(_MARKS)
        text: str = caller()
        return f"{marks[0]}{text}{marks[1]}" if marks else text


class _Sandbox(QuickSandbox):
    """The sandbox, with repetition and powers capped: `'x' * 10**12` is refused before memory is asked for."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > 1 << 32 or right > 64):
            raise TemplateError("a power too large for a template")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and len(one) * max(int(other), 0) > LONGEST_REPEAT:
                    raise TemplateError("a repetition too long for a template")
        return super().call_binop(context, operator, left, right)


class _Namespace(jinja2.utils.Namespace):
    """Namespaces without underscore names, as transformers has it."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # jinja's own signature, so that `self=` works
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")


class _Dict:
    """`dict(...)` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(*args, **kwargs)


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None,
        separators: tuple[str, str] | None = None, sort_keys: bool = False,
    ) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _compile(text: str, name: str, now: datetime) -> jinja2.Template:
    if len(text) > LONGEST_TEMPLATE:
        raise DataError(
            "the chat template is too long", where=name, value=f"{len(text)} characters",
            remedy=f"at most {LONGEST_TEMPLATE}",
        )  # fmt: skip
    try:
        compiled = _environment(now).from_string(text)
        compiled.globals = dict(compiled.globals)  # a chain of dictionaries is slow, and each render reads all of it
        return compiled
    except Exception as error:  # noqa: BLE001 - jinja's own, and those of Python on what jinja compiled it to
        line = getattr(error, "lineno", None) if isinstance(error, TemplateError) else None
        raise DataError(
            "the chat template does not parse", where=f"{name}:{line}" if line else name,
            value=getattr(error, "message", None) or f"{type(error).__name__}: {error}",
            remedy="mend it, or give another in model.chat_template",
        ) from None  # fmt: skip


def _constants(text: str, name: str) -> list[str]:
    """The literal texts of a template: what it prints as it stands, and its string constants (joined by `+`, `~`)."""
    try:
        tree = _environment(datetime.fromtimestamp(0)).parse(text)  # noqa: DTZ006 - no date is printed
    except TemplateError as error:
        raise DataError("the chat template does not parse", where=name, value=error.message) from None
    found = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    found += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    return found
