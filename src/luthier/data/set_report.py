"""The report and the card of a built set on disk: its rows counted once, its ledger and manifest read.

`set_report` is what `luthier data report` says; `make_card` writes README.md and stats.json beside the rows. The rows
that a card shows are drawn as a spot-check is, by the seed of the build.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.step import Item
from luthier.data.built_set import LEDGER, MANIFEST, built_rows, facts_file, rows_file
from luthier.data.card import README, STATS, CardWords, card_facts, write_card
from luthier.data.quality_count import Quality
from luthier.data.quality_report import counted, report
from luthier.data.row_facts import listed
from luthier.data.spot_check import SamplePlan, picked
from luthier.data.tally import Tally
from luthier.data.topics import Embed


def set_report(built: Path, words: Path | None = None, embed: Embed | None = None) -> dict[str, Any]:
    """The quality report of a built set; of a file of rows by itself without what only the ledger knows.

    What a build has counted is not counted again: stats.json, where it is of this manifest.
    """
    if words is None and embed is None and (made := _counted_before(built)):
        return made
    phrases = frozenset(words.read_text("utf-8").split("\n")) - {""} if words else frozenset()
    detect = listed(phrases) if phrases else None
    quality = counted((row.item for row in built_rows(built)), Quality(detect=detect))
    if not (built.is_dir() and (built / LEDGER).exists()):
        return report(quality, embed=embed)
    return _reported(quality, facts_file(built, LEDGER), embed)


def make_card(built: Path, words: CardWords, embed: Embed | None = None) -> list[Path]:
    """README.md and stats.json in the directory of a finished build."""
    manifest, ledger = facts_file(built, MANIFEST), facts_file(built, LEDGER)
    size = rows_file(built).stat().st_size
    if size != manifest["output"]["bytes"]:
        seen = f"{size} bytes of {manifest['output']['bytes']}"
        raise DataError("the rows are not those that the manifest seals", where=str(rows_file(built)), value=seen,
                        remedy="build the set again")  # fmt: skip
    quality = None if embed else _counted_before(built)  # with the tokens that only a build can count
    if quality is None:
        counts = counted((row.item for row in built_rows(built)), Quality(seed=manifest["seed"]))
        quality = _reported(counts, ledger, embed)
    facts = card_facts(manifest, ledger, quality)
    write_card(built, facts, words, _drawn(built, words.samples, manifest["seed"]))
    return [built / README, built / STATS]


def _counted_before(built: Path) -> dict[str, Any] | None:
    """The report that the build of this very manifest wrote."""
    if not (built / STATS).exists():
        return None
    stats = facts_file(built, STATS)
    made: dict[str, Any] = stats["quality"]
    return made if stats["manifest"] == facts_file(built, MANIFEST) else None


def _reported(quality: Quality, ledger: Any, embed: Embed | None) -> dict[str, Any]:
    sources = ledger["sources"]
    tallies = [Tally.from_json(made) for made in ledger["steps"]]
    return report(quality, tallies, read=sources["read"], rejected=sources["read"] - sources["kept"], embed=embed)


def _drawn(built: Path, samples: int, seed: int) -> Sequence[Item]:
    if not samples:
        return ()
    chosen, _ = picked(partial(built_rows, built), SamplePlan(rows=samples, by=("origin",), seed=seed))
    return [row.item for row in chosen]
