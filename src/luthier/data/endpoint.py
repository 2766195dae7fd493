"""An endpoint that a recipe names: any server of OpenAI's chat completions (vLLM, llama.cpp, Ollama, TGI, hosted ones).

    endpoint: {base_url: http://127.0.0.1:8000/v1, model: qwen, key_env: MY_KEY}

    POST base_url/chat/completions {"model", "messages", "temperature", "max_tokens", "seed"?, "response_format"?}

Here is what is asked: the section, the body of a question and its key (sha256 of address and whole body, so that an
answer is used again only for the very same request). asking.py is who asks. The secret is read from the environment
variable that `key_env` names when something is asked, and stands in no recipe, no key, no cache and no message.

Left out: streaming, tools, embeddings, other protocols (a gateway such as LiteLLM speaks this one for them).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from luthier.contracts.errors import RecipeError
from luthier.data.replies import Schema

Structured = Literal["schema", "object", "none"]
_LEAST = {"concurrency": 1, "timeout": 0.001, "attempts": 1, "repairs": 0, "temperature": 0, "backoff": 0,
          "answer_tokens": 1, "max_calls": 1, "max_tokens": 1}  # fmt: skip
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_WHOLE = ("concurrency", "attempts", "repairs", "answer_tokens", "max_calls", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The section of a recipe. Only base_url and model have to be said."""

    base_url: str  # up to and with /v1
    model: str
    key_env: str | None = None  # the environment variable that holds the key; none for a server that asks for none
    temperature: float = 0.0
    answer_tokens: int = 1024  # the longest answer
    concurrency: int = 8  # calls under way at once
    timeout: float = 120.0  # seconds for a whole call
    attempts: int = 6  # calls for one answer while the server is busy, broken or away
    repairs: int = 1  # times that a reply of a wrong form is asked for again
    structured: Structured = (
        "schema"  # how the form is asked for: response_format json_schema, json_object, or in words
    )
    max_calls: int | None = None  # budget of one run, in calls
    max_tokens: int | None = None  # budget of one run, in tokens as the server counts them
    backoff: float = field(default=1.0, compare=False)  # seconds before the second attempt; doubles, with jitter

    @property
    def address(self) -> str:
        return f"{self.base_url.rstrip('/')}/chat/completions"

    def key(self) -> str | None:
        """The secret, from the environment; RecipeError where the variable is not set."""
        if self.key_env is None:
            return None
        secret = os.environ.get(self.key_env, "").strip()
        if not secret or not secret.isascii() or not secret.isprintable():
            raise RecipeError(
                "the endpoint's key is not there", where="endpoint.key_env", value=self.key_env,
                remedy=f"set it: export {self.key_env}=…",
            )  # fmt: skip
        return secret


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask: messages, the form of the reply, and which of several samples of it this is."""

    messages: tuple[Mapping[str, str], ...]
    schema: Schema
    name: str = "answer"  # what the schema is called
    sample: int = 0

    def again(self, reply: str, what: str) -> Question:
        """The question whose answer was `reply`, asked for the right form."""
        repair = (
            f"That reply cannot be used: {what}. Answer again with one JSON object of this schema and nothing else:\n"
            + json.dumps(self.schema, ensure_ascii=False)
        )
        said = ({"role": "assistant", "content": reply}, {"role": "user", "content": repair})
        return Question((*self.messages, *said), self.schema, self.name, self.sample)


def body(endpoint: Endpoint, question: Question, seed: int) -> dict[str, Any]:
    """The request. `seed` is sent where it matters: at temperature 0 there is one answer."""
    made: dict[str, Any] = {
        "model": endpoint.model,
        "messages": [dict(message) for message in question.messages],
        "temperature": endpoint.temperature,
        "max_tokens": endpoint.answer_tokens,
    }
    if endpoint.temperature > 0:
        made["seed"] = (seed + question.sample) % 2**31
    if endpoint.structured == "schema":
        described = {"name": question.name, "strict": True, "schema": question.schema}
        made["response_format"] = {"type": "json_schema", "json_schema": described}
    elif endpoint.structured == "object":
        made["response_format"] = {"type": "json_object"}
    return made


def key_of(endpoint: Endpoint, request: Mapping[str, Any], sample: int) -> str:
    """sha256 of all that decides the answer."""
    whole = {"address": endpoint.address, "request": request, "sample": sample}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def endpoint_of(section: Mapping[str, Any], where: str) -> Endpoint:
    """The endpoint of a recipe's section; RecipeError with the field's place."""
    known = {one.name: one for one in fields(Endpoint)}
    for name in section:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean `{close[0]}`?" if close else f"fields: {', '.join(known)}"
            raise RecipeError("unknown field of an endpoint", where=f"{where}.{name}", remedy=remedy)
    for name in ("base_url", "model"):
        if not isinstance(section.get(name), str) or not section[name]:
            remedy = "such as {base_url: http://127.0.0.1:8000/v1, model: NAME}"
            raise RecipeError(f"the endpoint needs {name}", where=f"{where}.{name}", remedy=remedy)
    _check_numbers(section, where)
    _check_address(section["base_url"], f"{where}.base_url")
    if section.get("structured", "schema") not in get_args(Structured):
        raise RecipeError("unknown way to ask for a form", where=f"{where}.structured", value=section["structured"],
                          remedy=f"one of {', '.join(get_args(Structured))}")  # fmt: skip
    variable = section.get("key_env")
    if variable is not None and (not isinstance(variable, str) or not _VARIABLE.fullmatch(variable)):
        raise RecipeError("key_env is the name of an environment variable", where=f"{where}.key_env",
                          remedy="write the name, such as MY_KEY, never the key itself")  # fmt: skip
    return Endpoint(**section)


def endpoints_of(section: Mapping[str, Any] | Sequence[Mapping[str, Any]], where: str) -> tuple[Endpoint, ...]:
    """One endpoint, or several in a list."""
    if isinstance(section, Mapping):
        return (endpoint_of(section, where),)
    made = tuple(endpoint_of(one, f"{where}[{index}]") for index, one in enumerate(section))
    if not made or len({(one.address, one.model) for one in made}) < len(made):
        raise RecipeError("endpoints must be there, and differ", where=where, remedy="name each model once")
    return made


def _check_numbers(section: Mapping[str, Any], where: str) -> None:
    for name, least in _LEAST.items():
        value = section.get(name)
        if value is None and (name in ("max_calls", "max_tokens") or name not in section):
            continue
        kind = int if name in _WHOLE else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < float("inf"):
            noun = "whole number" if name in _WHOLE else "number"
            raise RecipeError(f"not a {noun} of at least {least}", where=f"{where}.{name}", value=value)


def _check_address(url: str, where: str) -> None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (a wrong port is raised when it is read)
    except ValueError:
        raise RecipeError("not an address", where=where, remedy="such as http://127.0.0.1:8000/v1") from None
    if parts.username or parts.password:
        raise RecipeError("an address holds no user and no password", where=where, remedy="name a variable in key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        seen = f"{parts.scheme}://{parts.hostname or ''}"
        raise RecipeError("not the address of an endpoint", where=where, value=seen,
                          remedy="http or https, a host and a path, such as http://127.0.0.1:8000/v1")  # fmt: skip
