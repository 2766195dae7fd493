"""One HTTP call to an endpoint, and what may come of it: an answer, or one of three faults.

    Faulty         busy, broken or away: worth another attempt (`row`: it may be this row's doing, `wait`: Retry-After)
    Refused        the endpoint will not answer this row, however often it is asked
    Unauthorised   it will answer none: the key, the model or the address is wrong

The whole call has one deadline (a server that drips a byte a minute is as dead as one that hangs), the body a size cap,
redirects are not followed (the key would travel to a place that nobody named). Messages say the status and the
server's own error code where that is one word; bodies may quote the row, so they are shown nowhere.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any

import httpx

from luthier.data.answers import Answer
from luthier.data.endpoint import Endpoint

MOST_BYTES = 8 << 20
_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,47}")
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_NEVER = {
    401: "set the key: endpoint.key_env names the variable", 403: "the key may not use this model",
    404: "look at endpoint.base_url (it ends with /v1) and endpoint.model", 402: "the account has no credit",
    405: "look at endpoint.base_url", 407: "the proxy asks for a login",
}  # fmt: skip
_SPENT = frozenset({"insufficient_quota", "billing_hard_limit_reached"})


class Faulty(Exception):
    """Another attempt may do. `row`: it may be the row's doing; `wait`: seconds that the server asks for."""

    def __init__(self, what: str, *, row: bool = True, wait: float = 0.0) -> None:
        self.what, self.row, self.wait = what, row, wait
        super().__init__(what)


class Refused(Exception):
    """This row is not answered."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(what)


class Unauthorised(Exception):
    """No row is answered."""

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        super().__init__(what)


@dataclass(frozen=True)
class Call:
    """A client and where it asks. The key is read when the first call is made."""

    client: httpx.AsyncClient
    endpoint: Endpoint

    @cached_property
    def headers(self) -> dict[str, str]:
        secret = self.endpoint.key()
        plain = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        return plain if secret is None else {**plain, "Authorization": f"Bearer {secret}"}


async def called(call: Call, request: Mapping[str, Any]) -> Answer:
    """The answer to a request; Faulty, Refused or Unauthorised."""
    payload = json.dumps(request, ensure_ascii=True).encode()
    headers = call.headers
    try:
        async with asyncio.timeout(call.endpoint.timeout):
            async with call.client.stream("POST", call.endpoint.address, content=payload, headers=headers) as response:
                content = await _content(response)
    except (TimeoutError, httpx.TimeoutException):
        raise Faulty("the endpoint gave no answer in time") from None
    except (httpx.ConnectError, httpx.ProxyError, httpx.UnsupportedProtocol):
        raise Faulty("no connection to the endpoint", row=False) from None
    except httpx.RequestError:
        raise Faulty("the connection broke off") from None
    if response.status_code != 200:
        raise _fault(response, _code(content, headers.get("Authorization", "")))
    return _answer(content, len(payload))


async def _content(response: httpx.Response) -> bytes:
    made = bytearray()
    async for chunk in response.aiter_bytes():
        made += chunk
        if len(made) > MOST_BYTES:
            raise Refused("the answer is larger than 8 MiB")
    return bytes(made)


def _fault(response: httpx.Response, code: str) -> Exception:
    status = response.status_code
    said = f"the endpoint answers {status}" + (f" {code}" if code else "")
    if code in _SPENT:
        return Unauthorised(said, "the account has no credit left; run again when it has")
    if status in _AGAIN or status >= 500:
        return Faulty(said, row=status != 429, wait=retry_after(response.headers.get("retry-after", "")))
    if 300 <= status < 400:
        return Unauthorised(f"{said}: a redirect, which is not followed", "write the final address into base_url")
    if status in _NEVER:
        return Unauthorised(said, _NEVER[status])
    return Refused(f"the endpoint refuses the row: {said.removeprefix('the endpoint answers ')}")


def retry_after(text: str) -> float:
    """Seconds of a Retry-After header, in either of its forms; 0 for one that says nothing."""
    text = text.strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _code(content: bytes, secret: str) -> str:
    """The server's own word for the fault: `error.code` or `error.type`, where it is one word and not the key."""
    try:
        error = json.loads(content)["error"]
        words = [error.get("code"), error.get("type")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return next((word for word in words if isinstance(word, str) and _CODE.fullmatch(word) and word not in secret), "")


def _answer(content: bytes, asked: int) -> Answer:
    try:
        made = json.loads(content)
        choice = made["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise Faulty("the body is no chat completion") from None
    if isinstance(text, list):  # parts, as some servers send them
        text = "".join(part.get("text", "") for part in text if isinstance(part, Mapping))
    if refusal or choice.get("finish_reason") == "content_filter":
        raise Refused("the model declines to answer")
    if text is not None and not isinstance(text, str):
        raise Faulty("the body is no chat completion")
    usage = made.get("usage") if isinstance(made.get("usage"), Mapping) else {}
    counted = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    guessed = (asked // 4, len(text or "") // 4)  # where the server does not count
    prompt, answer = (c if type(c) is int and c >= 0 else g for c, g in zip(counted, guessed, strict=True))
    return Answer(text or "", str(choice.get("finish_reason") or "stop"), prompt, answer)
