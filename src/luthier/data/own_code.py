"""A digest of this room's own files: what is kept between runs is used only by the very code that made it.

Source, word lists and templates alike (`.py`, `.json`, `.jinja`), and what a record is; and the versions of the
libraries that decide what a row becomes. Leaves out pages for people, which decide nothing.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

from luthier.contracts import record, step

_ENDINGS = (".py", ".json", ".jinja")
_LIBRARIES = ("jinja2", "model2vec", "numpy", "rensa", "tokenizers")


@cache
def code() -> str:
    """sha256, the same wherever the package is installed."""
    here, state = Path(__file__).parent, hashlib.sha256()
    for path in sorted(one for one in here.rglob("*") if one.suffix in _ENDINGS):
        state.update(path.relative_to(here).as_posix().encode() + b"\0" + path.read_bytes())
    for module in (record, step):
        state.update(Path(str(module.__file__)).read_bytes())
    state.update(repr([(name, version(name)) for name in _LIBRARIES]).encode())
    return state.hexdigest()
