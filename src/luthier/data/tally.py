"""What a step did with its rows, in counts that add up: read + added = kept + each reason.

Tallies of parts add: a build counts each part by itself and joins them in the order of the parts, so the numbers and
the first places of a reason are the same however many processes there were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.contracts.record import Source

_EXAMPLES = 5


@dataclass
class Left:
    """How many rows left for one reason, and where the first of them came from."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, source: Source) -> None:
        self.count += 1
        if len(self.places) < _EXAMPLES:
            self.places.append(str(source))


@dataclass
class Tally:
    """One step over some rows."""

    name: str
    read: int = 0
    kept: int = 0
    added: dict[str, int] = field(default_factory=dict)
    left: dict[str, Left] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)  # rows of which something was changed, by what
    origins: dict[str, list[int]] = field(default_factory=dict)  # data source -> [read, kept]
    figures: dict[str, Any] = field(default_factory=dict)

    def leave(self, reason: str, source: Source) -> None:
        self.left.setdefault(reason, Left()).add(source)

    def change(self, what: str) -> None:
        self.changed[what] = self.changed.get(what, 0) + 1

    def add(self, what: str, rows: int = 1) -> None:
        self.added[what] = self.added.get(what, 0) + rows

    def saw(self, origin: str, *, read: int = 0, kept: int = 0) -> None:
        """Rows of a data source that came in and went on."""
        counts = self.origins.setdefault(origin, [0, 0])
        counts[0] += read
        counts[1] += kept
        self.read += read
        self.kept += kept

    def join(self, other: Tally) -> None:
        """The rows of a later part."""
        self.read += other.read
        self.kept += other.kept
        for reason, left in other.left.items():
            mine = self.left.setdefault(reason, Left())
            mine.count += left.count
            mine.places = (mine.places + left.places)[:_EXAMPLES]
        for mine_, others in ((self.added, other.added), (self.changed, other.changed)):
            for what, count in others.items():
                mine_[what] = mine_.get(what, 0) + count
        for origin, (read, kept) in other.origins.items():
            counts = self.origins.setdefault(origin, [0, 0])
            counts[0] += read
            counts[1] += kept
        self.figures.update(other.figures)

    def assert_balanced(self) -> None:
        came, went = self.read + sum(self.added.values()), self.kept + sum(one.count for one in self.left.values())
        if came != went:
            raise AssertionError(
                f"{self.name}: {self.read} read and {came - self.read} added, but {went} accounted for"
            )

    def to_json(self) -> dict[str, Any]:
        self.assert_balanced()
        origins = {origin: list(counts) for origin, counts in self.origins.items()}
        return {
            "name": self.name, "read": self.read, "kept": self.kept, "added": dict(self.added),
            "left": {reason: {"count": one.count, "places": list(one.places)} for reason, one in self.left.items()},
            "changed": dict(self.changed), "origins": origins, "figures": dict(self.figures),
        }  # fmt: skip

    @classmethod
    def from_json(cls, made: Mapping[str, Any]) -> Tally:
        left = {reason: Left(one["count"], list(one["places"])) for reason, one in made["left"].items()}
        origins = {origin: list(counts) for origin, counts in made["origins"].items()}
        return cls(made["name"], made["read"], made["kept"], dict(made["added"]), left, dict(made["changed"]), origins,
                   dict(made["figures"]))  # fmt: skip

    def summary(self) -> str:
        """For people: one line, then a line for each reason."""
        added = "".join(f" + {count} {what}" for what, count in self.added.items())
        left = "".join(f" - {one.count} {reason}" for reason, one in self._by_size())
        changed = ", ".join(f"{what} in {count}" for what, count in self.changed.items())
        return f"{self.name}: {self.read}{added}{left} = {self.kept}" + (f" ({changed})" if changed else "")

    def _by_size(self) -> list[tuple[str, Left]]:
        return sorted(self.left.items(), key=lambda entry: (-entry[1].count, entry[0]))
