"""What became of every row: read = kept + each reason, asserted. Nothing leaves without a reason and an example.

A reason is a short phrase of ours, never content of the row. The training split counts as kept; rows that went to
the evaluation split are counted beside it (`evaluation`), rejects are the rows that were wrong (bad_rows: quarantine).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.contracts.record import Source
from luthier.data.tally import Tally

_EXAMPLES = 5
_COUNTS = ("read", "kept", "evaluation", "samples", "tokens", "scored_tokens")


class Dropped(Exception):
    """A policy of the recipe drops this row; `reason` is what the ledger counts, without any content of the row."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass
class Reason:
    """How many rows left for one reason, and the first few of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, source: Source) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(str(source))


@dataclass(frozen=True)
class Change:
    """Something that was done to a row that is kept: how much of it, of what, and whether people should be warned."""

    amount: int
    of: str
    warn: bool = False


@dataclass
class Changes(Reason):
    """How many kept rows something was done to, how much in all, and the first few of them."""

    amount: int = 0
    of: str = ""
    warn: bool = False


@dataclass
class Account:
    """One file (with its use): rows read, kept, dropped by policy and rejected as wrong."""

    file: str
    use: str  # train | eval
    read: int = 0
    kept: int = 0
    evaluation: int = 0  # of the kept rows, those that the share of `data.eval` took out of training
    samples: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    dropped: dict[str, Reason] = field(default_factory=dict)
    rejected: dict[str, Reason] = field(default_factory=dict)
    changed: dict[str, Changes] = field(default_factory=dict)  # kept rows, by what was done to them

    def change(self, what: str, change: Change, source: Source) -> None:
        changes = self.changed.setdefault(what, Changes(of=change.of, warn=change.warn))
        changes.amount += change.amount
        changes.add(source)

    def drop(self, reason: str, source: Source) -> None:
        self.dropped.setdefault(reason, Reason()).add(source)

    def reject(self, reason: str, source: Source) -> None:
        self.rejected.setdefault(reason, Reason()).add(source)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` undoes it."""
        return {
            "file": self.file,
            "use": self.use,
            **{name: getattr(self, name) for name in _COUNTS},
            "dropped": {name: vars(reason) for name, reason in self.dropped.items()},
            "rejected": {name: vars(reason) for name, reason in self.rejected.items()},
            **({"changed": {name: vars(change) for name, change in self.changed.items()}} if self.changed else {}),
        }

    @classmethod
    def from_json(cls, made: Mapping[str, Any]) -> Account:
        counts = {name: made[name] for name in _COUNTS}
        dropped, rejected = (
            {name: Reason(**one) for name, one in made[part].items()} for part in ("dropped", "rejected")
        )
        changed = {name: Changes(**one) for name, one in made.get("changed", {}).items()}
        return cls(made["file"], made["use"], **counts, dropped=dropped, rejected=rejected, changed=changed)

    @property
    def reasons(self) -> dict[str, int]:
        both: dict[str, int] = {}
        for part in (self.dropped, self.rejected):
            for name, reason in part.items():
                both[name] = both.get(name, 0) + reason.count
        return both


@dataclass
class Ledger:
    """The accounts of all files, and the rejected rows themselves for `rejects.jsonl`."""

    accounts: list[Account] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    build: Mapping[str, Any] | None = None  # the ledger of the build whose rows these are, where steps made them
    leaked: int = 0  # evaluation rows of a file of their own that also stand in the training rows
    notes: list[str] = field(default_factory=list)  # how sources were read and rows encoded

    def account(self, file: str, use: str) -> Account:
        """The account of a file under a use; made on first call."""
        for account in self.accounts:
            if (account.file, account.use) == (file, use):
                return account
        self.accounts.append(Account(file, use))
        return self.accounts[-1]

    def join(self, other: Ledger) -> None:
        """The rows of another reading beside these: a file that both read is counted in both."""
        self.accounts += other.accounts
        self.rejects += other.rejects
        self.notes += [note for note in other.notes if note not in self.notes]

    def total(self, name: str) -> int:
        """Sum of a number over the accounts: read, kept, evaluation, samples, tokens, scored_tokens."""
        return sum(getattr(account, name) for account in self.accounts)

    @property
    def reasons(self) -> dict[str, int]:
        both: dict[str, int] = {}
        for account in self.accounts:
            for name, count in account.reasons.items():
                both[name] = both.get(name, 0) + count
        return dict(sorted(both.items(), key=lambda item: (-item[1], item[0])))

    def assert_balanced(self) -> None:
        """read = kept + each reason, in every account."""
        for account in self.accounts:
            left = sum(account.reasons.values())
            if account.read != account.kept + left or account.evaluation > account.kept:
                raise AssertionError(
                    f"ledger of {account.file}: read {account.read}, kept {account.kept}, left with a reason {left}"
                )

    def to_json(self) -> dict[str, Any]:
        """Plain data for `data/ledger.json`."""
        self.assert_balanced()
        return {
            **{name: self.total(name) for name in _COUNTS},
            "reasons": self.reasons,
            "evaluation_rows_also_in_training": self.leaked,
            **({"notes": self.notes} if self.notes else {}),
            "files": [account.to_json() for account in self.accounts],
            **({"build": self.build} if self.build else {}),
        }

    def summary(self) -> str:
        """For people: one line in all, one for each reason with the first places."""
        lines = summary_of_build(self.build) if self.build else []
        lines += [
            f"{self.total('read')} rows read = {self.total('kept')} kept"
            + "".join(f" + {count} {name}" for name, count in self.reasons.items())
        ]
        if self.total("evaluation"):
            lines.append(f"{self.total('evaluation')} of the kept rows are held out for evaluation")
        if self.leaked:
            lines.append(f"warning: {self.leaked} evaluation rows also stand in the training rows")
        for account in self.accounts:
            for name, reason in (*account.dropped.items(), *account.rejected.items()):
                more = ", …" if reason.count > len(reason.examples) else ""
                lines.append(f"  {reason.count} {name}: {', '.join(reason.examples)}{more}")
            for name, change in account.changed.items():
                more = ", …" if change.count > len(change.examples) else ""
                said = f"{change.count} {'row' if change.count == 1 else 'rows'} {name}, {change.amount} {change.of}"
                lines.append(f"  {'warning: ' if change.warn else ''}{said}: {', '.join(change.examples)}{more}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def summary_of_build(build: Mapping[str, Any]) -> list[str]:
    """The ledger of a build for people: the files, then one line a step."""
    sources = build["sources"]
    reasons = "".join(f" + {count} {name}" for name, count in sources["reasons"].items())
    steps = [Tally.from_json(made).summary() for made in build["steps"]]
    return [f"build: {sources['read']} rows read = {sources['kept']} kept{reasons}", *(f"  {line}" for line in steps)]
