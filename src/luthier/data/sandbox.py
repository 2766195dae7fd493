"""The sandbox of chat templates, with short ways for what every template does a hundred times a row.

jinja2's sandbox asks a dozen questions at each `message.role` and each `content.strip()`: is the name private, is it
an internal of Python, would it change a list. For a plain dictionary, a plain string and the loop variable the answers
are known beforehand, so they are not asked again; everything else goes the sandbox's own way. The rule is:

    dict        a name that is no attribute of dict               -> its item, or undefined
    str         a method in _TEXT, which takes and gives values   -> the bound method (`format` is never among them)
    loop        a name in _LOOP                                   -> its value
    namespace   a name without underscore, no bound method        -> its value

Exact types only: a subclass may answer otherwise. Leaves out: lists, whose methods change them.
"""

from __future__ import annotations

from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_DICT = frozenset(dir(dict))
_TEXT = frozenset(
    [
        "startswith", "endswith", "strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "replace",
        "removeprefix", "removesuffix", "lower", "upper", "title", "capitalize", "find", "rfind", "index", "count",
        "partition", "rpartition", "isdigit", "isalpha", "isspace",
    ]
)  # fmt: skip
_LOOP = frozenset(["first", "last", "index", "index0", "revindex", "revindex0", "length", "previtem", "nextitem"])


class QuickSandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox; the same answers in less time."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:
            if attribute not in _DICT:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        elif kind is str:
            if attribute in _TEXT:
                return getattr(obj, attribute)
        elif kind is LoopContext:
            if attribute in _LOOP:
                return getattr(obj, attribute)
        elif isinstance(obj, Namespace) and attribute[:1] != "_":
            value = getattr(obj, attribute, self)
            if value is not self and type(value) not in (BuiltinMethodType, MethodType):
                return value
        return super().getattr(obj, attribute)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if type(__obj) is BuiltinMethodType and type(__obj.__self__) is str and __obj.__name__ in _TEXT:
            kwargs.pop("_loop_vars", None)  # jinja's own, for callables that ask for the context
            kwargs.pop("_block_vars", None)
            return __obj(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)
