"""Reading the labelled rows of personal data: `Write to [[email:a@b.org]]` says what must be found, and nothing else.

Secrets are written as forms, `ghp_{36}`, and filled in here with letters that a fixed sum gives, so that no file of the
repository holds what a scanner of secrets would take for one: {36} letters and digits, {16A} capitals, {32h} hex,
{12d}."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from luthier.data.personal import Hit

_MARK = re.compile(r"\[\[(?P<kind>[a-z_]+):(?P<value>.+?)\]\]", re.DOTALL)
_FORM = re.compile(r"\{(?P<length>\d+)(?P<alphabet>[Ahd]?)\}")
_ALPHABETS = {
    "": "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ0123456789", "A": "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567",
    "h": "0123456789abcdef", "d": "0123456789",
}  # fmt: skip


@dataclass(frozen=True)
class Labelled:
    text: str
    wanted: tuple[tuple[str, int, int], ...]  # kind, start, end


@dataclass
class Score:
    """Found and wanted places of all rows, by kind."""

    right: Counter[str] = field(default_factory=Counter)
    missed: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)

    @property
    def recall(self) -> float:
        return self.right.total() / (self.right.total() + len(self.missed))

    @property
    def precision(self) -> float:
        return self.right.total() / (self.right.total() + len(self.wrong))


def rows(path: Path) -> list[Labelled]:
    return [labelled(json.loads(line)["row"]) for line in path.read_text("utf-8").splitlines()]


def labelled(row: str) -> Labelled:
    text, wanted, at = "", [], 0
    for match in _MARK.finditer(row):
        if match["kind"] not in {"email", "phone", "ip", "card", "iban", "cn_id", "ssn", "key", "login", "mac"}:
            continue
        text += row[at : match.start()]
        value = _FORM.sub(_filled, match["value"])
        wanted.append((match["kind"], len(text), len(text) + len(value)))
        text, at = text + value, match.end()
    return Labelled(text + row[at:], tuple(wanted))


def score(labelled_rows: Iterable[Labelled], find: Callable[[str], list[Hit]]) -> Score:
    """A hit is right where kind and place agree: the same ends but for spaces and brackets."""
    made = Score()
    for row in labelled_rows:
        found = {(hit.kind, *_core(row.text, hit.start, hit.end)) for hit in find(row.text)}
        wanted = {(kind, *_core(row.text, start, end)) for kind, start, end in row.wanted}
        made.right.update(kind for kind, _, _ in found & wanted)
        made.missed += [(kind, row.text[start:end]) for kind, start, end in sorted(wanted - found)]
        made.wrong += [(kind, row.text[start:end]) for kind, start, end in sorted(found - wanted)]
    return made


def _core(text: str, start: int, end: int) -> tuple[int, int]:
    outer = " ()+\n"
    while start < end and text[start] in outer:
        start += 1
    while end > start and text[end - 1] in outer:
        end -= 1
    return start, end


def _filled(match: re.Match[str]) -> str:
    alphabet, length = _ALPHABETS[match["alphabet"]], int(match["length"])
    seed = match.string[: match.start()].encode()
    drawn = b"".join(blake2b(seed + bytes([i])).digest() for i in range(length // 64 + 1))
    return "".join(alphabet[byte % len(alphabet)] for byte in drawn[:length])
