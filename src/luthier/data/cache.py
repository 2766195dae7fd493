"""Encoded rows kept between runs, under `$XDG_CACHE_HOME/luthier/encoded/<key>` (stored.py says in which form).

The key is a digest of all that decides the result: the bytes of every data file and how it is read, mask, lengths and
policies, the tokenizer, the template (with the date where it prints one), the seed, the kinds of records, and the
source of this room itself. Nothing is looked up by name or time. What does not verify is made anew, and said.

`data.cache`: `auto` keeps sets whose files hold at least 4 MiB, in at most a tenth of the disk; a number is the limit
in GiB and keeps every set; `off` keeps none. Over the limit the sets that were used longest ago go first; a set that is
larger than the limit by itself serves its run from the disk and is gone after it. Two runs that make one set at once
both finish; the second finds the place taken and uses what is there. Leaves out: data sets of the hub, whose content is
not known before they are fetched, and encoders other than data/encode.py's.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.data.contents import Content
from luthier.data.encode import Encoder
from luthier.data.ledger import Account, Ledger
from luthier.data.own_code import code
from luthier.data.pairs import ChosenSide
from luthier.data.reading import Place
from luthier.data.stored import MAKING, Stored, Unusable, opened, size_of
from luthier.recipe.recipe import DataSection

LAYOUT = 1  # raise it when arrays or tables mean something else
LEAST_BYTES = 4 << 20
SHARE_OF_DISK = 0.1
_DAY_SECONDS = 86_400.0
_NOT_DECIDING = {"cache", "workers", "packing"}


def root() -> Path:
    """Where encoded rows are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "luthier" / "encoded"


@dataclass(frozen=True)
class Key:
    """What decides a set, and its digest."""

    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        return hashlib.sha256(_json(self.facts)).hexdigest()[:32]

    @property
    def place(self) -> Path:
        return root() / self.name


def key_of(
    section: DataSection, encoder: Any, contents: Mapping[str, Content], files: Sequence[Place], how: Mapping[str, Any]
) -> Key | None:
    """The key of a set, or None where it cannot be kept. `how`: seed, kinds and name of the objective."""
    encoding = _encoding(encoder)
    paths = [place.path for place in files]
    if section.cache == "off" or encoding is None or any(path not in contents for path in paths):
        return None
    if section.cache == "auto" and sum(contents[path].stamp[2] for path in set(paths)) < LEAST_BYTES:
        return None
    said = section.model_dump(mode="json", exclude=_NOT_DECIDING)
    return Key({
        "layout": LAYOUT, "files": [[path, contents[path].digest.hex()] for path in paths], "section": said,
        "sources": [[place.use, place.source, place.spec.model_dump(mode="json")] for place in files],
        "encoder": encoding, "how": dict(how), "code": code(),
        "python": platform.python_version(),
    })  # fmt: skip


def _encoding(encoder: Any) -> dict[str, Any] | None:
    """All that decides what an encoder makes of a record; None for encoders not known here."""
    if type(encoder) is ChosenSide:
        inner = _encoding(encoder.encoder)
        return None if inner is None else {"side": "chosen", "of": inner}
    if type(encoder) is not Encoder:
        return None
    tokenizer, template = encoder.tokenizer, encoder.template
    dated = template is not None and any("strftime_now" in text for text in template.texts)
    return {
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "tokens": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "name": str(tokenizer.name_or_path), "policy": asdict(encoder.policy), "max_tokens": encoder.max_tokens,
        "overlong": encoder.overlong, "stops": list(encoder.stop_ids), "score_prompt": encoder.score_prompt,
        "template": template and {
            "texts": template.texts, "special": dict(template.special), "name": template.name,
            "variables": dict(template.variables), "date": template.now.isoformat() if dated else None,
        },
    }  # fmt: skip


def taken(key: Key) -> tuple[Stored | None, str]:
    """What is kept under the key, and a sentence where something is there that cannot be used."""
    if not key.place.exists():
        return None, ""
    try:
        found = opened(key.place)
        os.utime(key.place)
    except (Unusable, OSError) as error:
        shutil.rmtree(key.place, ignore_errors=True)
        return None, f"kept rows cannot be used ({error}): they are encoded again"
    return found, ""


def limit_of(section: DataSection) -> int:
    """Bytes that all kept sets may take."""
    if isinstance(section.cache, float | int):
        return int(section.cache * 2**30)
    place = next(path for path in [root(), *root().parents] if path.exists())
    return int(shutil.disk_usage(place).total * SHARE_OF_DISK)


def making_of(key: Key) -> Path:
    """A directory of this process to make a set in."""
    return key.place.with_name(f"{key.name}.{os.getpid()}.{time.monotonic_ns()}{MAKING}")


@dataclass(frozen=True)
class Entry:
    """One kept set, or one under way."""

    path: Path
    bytes: int
    used: float  # when it was last used
    whole: bool


def entries(place: Path | None = None) -> list[Entry]:
    """All sets, used longest ago first."""
    found = []
    folder = place or root()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            used = path.stat().st_mtime
        except FileNotFoundError:
            continue
        found.append(Entry(path, size_of(path), used, path.suffix != MAKING))
    return sorted(found, key=lambda entry: entry.used)


def tidy(limit: int, keep: Path) -> None:
    """Remove what killed runs left behind, and the sets used longest ago while all together are over the limit."""
    sets = [entry for entry in entries() if entry.path != keep]
    total = size_of(keep) + sum(entry.bytes for entry in sets)
    for entry in sets:
        torn = not entry.whole and time.time() - entry.used > _DAY_SECONDS
        if torn or (entry.whole and total > limit):
            shutil.rmtree(entry.path, ignore_errors=True)
            total -= entry.bytes


def ledger_table(ledger: Ledger) -> dict[str, Any]:
    """A ledger as plain data; `ledger_of` undoes it."""
    accounts = [account.to_json() for account in ledger.accounts]
    return {"accounts": accounts, "rejects": ledger.rejects, "leaked": ledger.leaked, "notes": ledger.notes}


def ledger_of(told: Mapping[str, Any]) -> Ledger:
    """Inverse of `ledger_table`."""
    accounts = [Account.from_json(account) for account in told["accounts"]]
    return Ledger(accounts, list(told["rejects"]), leaked=told["leaked"], notes=list(told["notes"]))


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
