"""The last passes of a build: its quality counted; one file of rows, their account, their card, the sealing manifest.

The manifest goes first and comes last: while it is absent, or while the rows are not of the size that it says, there
is no built set. The ledger must add up from the first file to the last row, step by step, or nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.step import Item
from luthier.data import built
from luthier.data.card import CardWords, card_facts, write_card
from luthier.data.exact_words import as_it_is, digest_of
from luthier.data.ledger import Account, Ledger
from luthier.data.passes import ApplyPass, PartPass, Pass, Read, Report, RowPass
from luthier.data.quality_count import Quality
from luthier.data.quality_report import report as quality_report
from luthier.data.tally import Tally
from luthier.data.texts import whole
from luthier.disk.durable import replace_text, sync_directory
from luthier.disk.fault import fault

ROWS, MANIFEST, LEDGER, REJECTS = "train.jsonl", "manifest.json", "ledger.json", "rejects.jsonl"


@dataclass(frozen=True)
class CountPass(PartPass):
    """What the quality report and the card say of the rows, part by part; the rows stay as they are."""

    weights: tuple[tuple[str, float], ...]
    title = "quality"

    def unit(self, name: str, report: Report) -> None:
        quality, weights, rows = Quality(seed=self.room.seed, tokens=self.tokens), dict(self.weights), 0
        for item in self.before.items(name):
            quality.see(item, copies_of(item, weights.get(item.origin, 1.0), self.room.seed))
            rows += 1
        report(rows)
        self.stage.done(name, {"quality": quality.to_json()})

    @cached_property
    def tokens(self) -> Callable[[str], int] | None:
        """How long a text is for the model, where the build has a tokenizer."""
        if self.room.tokenizer is None:
            return None
        tokenizer = self.room.tokenizer()
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False))

    def joined(self) -> Quality:
        """The counts of all parts."""
        quality = Quality(seed=self.room.seed)
        for name in self.units():
            quality.join(Quality.from_json((self.stage.about(name) or {})["quality"]))
        return quality


@dataclass(frozen=True)
class FinishPass(PartPass):
    """One unit: everything that people and training read."""

    passes: tuple[Pass, ...]
    weights: tuple[tuple[str, float], ...]
    counts: CountPass
    manifest_words: dict[str, Any]
    serial = True
    title = "finish"

    def units(self) -> list[str]:
        return ["built"]

    def size(self, name: str) -> int:
        return sum(PartPass.size(self, part) for part in self.previous.parts())

    def is_done(self, name: str) -> bool:
        try:
            made = self.manifest()
            return bool(
                made["key"] == self.manifest_words["key"]
                and (self.stage.directory / ROWS).stat().st_size == made["output"]["bytes"]
            )
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def manifest(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads((self.stage.directory / MANIFEST).read_bytes())
        return made

    def ledger(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads((self.stage.directory / LEDGER).read_bytes())
        return made

    def unit(self, name: str, report: Report) -> None:
        out = self.stage.directory
        (out / MANIFEST).unlink(missing_ok=True)
        accounts, rejects, tallies = self.account()
        weigh = Tally("weight")
        output = self._rows(weigh, report)
        if any(weight != 1 for _, weight in self.weights):
            tallies.append(weigh)
        ledger = {
            "sources": accounts.to_json(),
            "steps": [tally.to_json() for tally in tallies],
            "rows": output["rows"],
        }
        assert_chained(accounts, tallies, output["rows"])
        if not output["rows"]:
            raise _nothing_left(accounts, tallies)
        replace_text(out / LEDGER, _pretty(ledger))
        if rejects:
            replace_text(out / REJECTS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejects))
        else:
            (out / REJECTS).unlink(missing_ok=True)
        manifest = {**self.manifest_words, "output": output}
        wrong = accounts.total("read") - accounts.total("kept")
        quality = quality_report(self.counts.joined(), tallies, read=accounts.total("read"), rejected=wrong)
        write_card(out, card_facts(manifest, ledger, quality), CardWords())
        fault("finish.before_manifest")
        replace_text(out / MANIFEST, _pretty(manifest))

    def account(self) -> tuple[Ledger, list[dict[str, str]], list[Tally]]:
        """Files read, rows rejected, and one tally for each step in the order of the recipe."""
        ledger, rejects, tallies = Ledger(), [], []
        for work in self.passes:
            if isinstance(work, Read):
                for name in work.units():
                    about = work.stage.about(name) or {}
                    ledger.accounts.append(Account.from_json(about["account"]))
                    rejects += about["rejects"]
            elif isinstance(work, RowPass):
                abouts = [work.stage.about(part) or {} for part in work.units()]
                for at, _ in enumerate(work.steps):
                    tallies.append(_joined([about["tallies"][at] for about in abouts], work.title.split(", ")[at]))
            elif isinstance(work, ApplyPass):
                made = [(work.stage.about(part) or {})["tally"] for part in work.units()]
                decision = Tally.from_json((work.decided.about("decision") or {})["tally"])
                tally = _joined(made, decision.name)
                tally.figures = decision.figures
                tallies.append(tally)
        return ledger, rejects, tallies

    def _rows(self, tally: Tally, report: Report) -> dict[str, Any]:
        """train.jsonl, whole or not at all."""
        path, fresh = self.stage.directory / ROWS, self.stage.directory / f"{ROWS}.new"
        digest, rows, size = hashlib.sha256(), 0, 0
        with fresh.open("wb") as file:
            for part in self.previous.parts():
                for item in self._weighed(part, tally):
                    line = built.line(item)
                    file.write(line)
                    digest.update(line)
                    rows, size = rows + 1, size + len(line)
                report(PartPass.size(self, part))
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        sync_directory(self.stage.directory)
        return {"file": ROWS, "rows": rows, "bytes": size, "sha256": digest.hexdigest()}

    def _weighed(self, part: str, tally: Tally) -> Iterator[Item]:
        weights = dict(self.weights)
        for item in self.before.items(part):
            copies = copies_of(item, weights.get(item.origin, 1.0), self.room.seed)
            tally.saw(item.origin, read=1, kept=copies)
            if not copies:
                tally.leave("left out by the weight of its source", item.record.source)
            elif copies > 1:
                tally.add("repeated", copies - 1)
            for _ in range(copies):
                yield item


def copies_of(item: Item, weight: float, seed: int) -> int:
    """How often a row of this weight stands in the set: the part behind the point by the hash of seed and row."""
    part = weight - int(weight)
    if not part:
        return int(weight)
    chance = (
        int.from_bytes(digest_of(as_it_is(f"{seed}|{item.record.source}|{whole(item.record)}"))[:8], "little") / 2.0**64
    )
    return int(weight) + (chance < part)


def assert_chained(ledger: Ledger, tallies: list[Tally], rows: int) -> None:
    """What one step keeps is what the next one reads, from the files to the built rows."""
    ledger.assert_balanced()
    there = ledger.total("kept")
    for tally in tallies:
        tally.assert_balanced()
        if tally.read != there:
            raise AssertionError(f"{tally.name} read {tally.read} rows of {there}")
        there = tally.kept
    if rows != there:
        raise AssertionError(f"{rows} rows were written, {there} are accounted for")


def _joined(made: list[dict[str, Any]], name: str) -> Tally:
    tally = Tally(name)
    for one in made:
        tally.join(Tally.from_json(one))
    return tally


def _nothing_left(ledger: Ledger, tallies: list[Tally]) -> DataError:
    said = "; ".join(tally.summary() for tally in tallies if tally.left) or "the files hold no row"
    return DataError(
        f"0 rows left to train on: read {ledger.total('read')}, {said}",
        where=", ".join(account.file for account in ledger.accounts[:3]),
        remedy="loosen the step that took them: data.steps",
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
