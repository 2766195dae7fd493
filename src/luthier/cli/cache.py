"""`luthier cache ls|clean`: what lies under `$XDG_CACHE_HOME/luthier`, how large it is, and away with it.

Rooms of the cache are its folders: encoded (rows as training reads them), reference (scores of a reference model),
quickstart (the tiny base). Everything there can be made again; a run that is using an entry goes on undisturbed, since
what it has open stays until it ends. No torch is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import click

_DAY_SECONDS = 86_400.0
_MAKING = ".making"


@click.group("cache", no_args_is_help=False, invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """What is kept between runs: list it, clean it up."""
    if context.invoked_subcommand is None:
        context.invoke(ls)


@command.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def ls(as_json: bool = False) -> None:
    """List the entries, used longest ago first."""
    found = entries()
    total = sum(entry["bytes"] for entry in found)
    if as_json:
        click.echo(json.dumps({"root": str(root()), "bytes": total, "entries": found}))
        return
    for entry in found:
        age = _age(time.time() - entry["used"])
        click.echo(
            f"{entry['room']}/{entry['name']:<34} {_size(entry['bytes']):>10}  used {age} ago  {entry['what']}".rstrip()
        )
    click.echo(f"{_size(total)} in {len(found)} entries under {root()}")


@command.command()
@click.option("--room", type=str, help="Only this folder: encoded, reference, quickstart.")
@click.option("--unused-days", type=click.FloatRange(min=0), default=0.0, help="Only what was not used for so long.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def clean(room: str | None = None, unused_days: float = 0.0, as_json: bool = False) -> None:
    """Remove entries; everything in the cache can be made again."""
    from luthier.contracts.errors import UsageError

    rooms = sorted({entry["room"] for entry in entries()})
    if room is not None and room not in rooms:
        raise UsageError("no such room of the cache", where="--room", value=room, remedy=f"there: {', '.join(rooms)}")
    before = time.time() - unused_days * _DAY_SECONDS
    gone = [e for e in entries() if room in (None, e["room"]) and e["used"] <= before]
    for entry in gone:
        shutil.rmtree(root() / entry["room"] / entry["name"], ignore_errors=True)
    freed = sum(entry["bytes"] for entry in gone)
    if as_json:
        click.echo(json.dumps({"removed": len(gone), "bytes": freed}))
        return
    click.echo(f"{len(gone)} entries removed, {_size(freed)} freed")


def root() -> Path:
    """Luthier's part of the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"


def entries() -> list[dict[str, Any]]:
    """Every entry of every room: name, bytes, when it was last used, and what its manifest says of it."""
    found = []
    rooms = sorted(path for path in root().iterdir() if path.is_dir()) if root().is_dir() else []
    for room in rooms:
        for path in sorted(room.iterdir()):
            try:
                used = path.stat().st_mtime
            except FileNotFoundError:  # another run tidies up at the same time
                continue
            found.append(
                {"room": room.name, "name": path.name, "bytes": _bytes(path), "used": used, "what": _what(path)}
            )
    return sorted(found, key=lambda entry: entry["used"])


def _bytes(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _what(path: Path) -> str:
    """The data files of encoded rows; a build under way (or left by a killed run) says so."""
    if path.name.endswith(_MAKING):
        return "under way, or left by a run that was killed"
    try:
        facts = json.loads((path / "manifest.json").read_bytes())["facts"]
        files = [name for name, _ in facts["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return ", ".join(files[:2]) + (f" and {len(files) - 2} more" if len(files) > 2 else "")


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _age(seconds: float) -> str:
    for name, length in (("d", _DAY_SECONDS), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"
