"""Answers of an endpoint on disk: whoever was asked once is not asked again, whatever happens to the process.

    answers-000001.jsonl    {"key": sha256 of the whole request, "text", "finish", "prompt_tokens", "answer_tokens"}

Append only: a process writes a segment of its own (O_EXCL gives it the number), one answer a line in one write, so an
answer is in the file when `put` returns and a kill -9 loses none; the segment is fsynced every `_SYNC_EVERY` answers
and at the end, for a machine that loses power. Opening reads all segments. The last line of a segment may be torn by a
crash: it is left out and `torn` says so. A line that is whole but no answer of ours is an error, never a guess.

Several processes may write one cache at once. In memory lies where each answer stands, not the answer: a million of
them are some 200 MB. Left out: eviction; delete the directory to ask anew.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.contracts.errors import DataError
from luthier.disk.durable import sync_directory
from luthier.disk.fault import fault

_SYNC_EVERY = 64
_KEY = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"key": str, "text": str, "finish": str, "prompt_tokens": int, "answer_tokens": int}


@dataclass(frozen=True, slots=True)
class Answer:
    """What an endpoint said: the text, why it ended there (stop, length, ...), and what it cost."""

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens


class Answers:
    """The answers of a directory, by key (hex). `torn` counts lines that a crash cut, `tokens` what all have cost."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._places: dict[bytes, tuple[int, int, int]] = {}  # key -> which segment, offset, length
        self._segments = sorted(path for path in directory.glob("answers-*.jsonl") if path.stem[8:].isdigit())
        self._own: int | None = None  # which segment is this process's
        self._writer: int | None = None
        self._end = self._unsynced = 0
        self.torn = self.tokens = 0
        for index in range(len(self._segments)):
            self._read(index)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def get(self, key: str) -> Answer | None:
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        segment, offset, length = place
        with self._segments[segment].open("rb", buffering=0) as file:
            return _parsed(os.pread(file.fileno(), length, offset), self._segments[segment], 0)[1]

    def put(self, key: str, answer: Answer) -> None:
        """Written when this returns; the same key again is no second line."""
        if key in self:
            return
        if self._writer is None:
            self._writer = self._open()
        line = json.dumps({"key": key, **asdict(answer)}, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
        fault("answers.write")
        written = 0
        while written < len(line):
            written += os.write(self._writer, line[written:])
        assert self._own is not None
        self._places[bytes.fromhex(key)] = (self._own, self._end, len(line))
        self._end += len(line)
        self.tokens += answer.tokens
        self._unsynced += 1
        if self._unsynced >= _SYNC_EVERY:
            os.fsync(self._writer)
            self._unsynced = 0

    def close(self) -> None:
        """All that was put is durable and the file is closed; the next `put` goes on in it."""
        if self._writer is not None:
            os.fsync(self._writer)
            os.close(self._writer)
            self._writer, self._unsynced = None, 0

    def _open(self) -> int:
        """Our segment: a new one the first time; the kernel decides who gets a number that two want."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        if self._own is not None:
            return os.open(self._segments[self._own], flags)
        self._directory.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.stem[8:]) for path in self._segments), default=0)
        while True:
            path = self._directory / f"answers-{number:06d}.jsonl"
            try:
                descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                number += 1
                continue
            sync_directory(self._directory)
            self._own = len(self._segments)
            self._segments.append(path)
            return descriptor

    def _read(self, index: int) -> None:
        offset, path = 0, self._segments[index]
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self.torn += 1
                    return
                key, answer = _parsed(line, path, number)
                if key not in self:
                    self._places[bytes.fromhex(key)] = (index, offset, len(line))
                    self.tokens += answer.tokens
                offset += len(line)


def _parsed(line: bytes, path: Path, number: int) -> tuple[str, Answer]:
    try:
        made: Any = json.loads(line)
    except (ValueError, RecursionError):
        made = None
    fits = isinstance(made, dict) and all(type(made.get(name)) is kind for name, kind in _FIELDS.items())
    if not fits or not _KEY.fullmatch(made["key"]):
        raise DataError(
            "a line of the cache is no answer", where=f"{path}:{number}",
            remedy="delete that line, and the answer is asked for again",
        )  # fmt: skip
    return made.pop("key"), Answer(**{name: made[name] for name in _FIELDS if name != "key"})
