"""`mix`: rows of several sources in set shares, by tokens, characters or rows, with a share of replay.

    data.mix: {weights: {code: 3, chat: 1}, replay: {origins: [general], share: 0.05}}

Without `total` the mixture is the largest that these shares allow: the scarcest source gives all of its rows
(`repeat_up_to: k` lets each row stand up to k times) and the others as many as fit its share. Which rows is decided by
a hash of the seed and of a row's own words, so the choice is the same whatever the order of the files and however many
parts they lie in; the amounts are then met to the nearest row (shares.py). `replay` keeps a share for general data that
the model should not forget (arXiv:2403.08763: 5 % does where the new data is near, more where it is far), divided
among its sources as they are large.

Sizes are counted over the words of a row, without the template's tokens. Cost: one reading of the rows and a sort.
Rows keep their order; training shuffles. Leaves out: weights that change during training (train.stages), sampling with
luck. The rows of a source that `others: keep` passes stand beside the mixture and count in no share.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.step import Decision, Item, Room, Rows, SetStep, Sketcher
from luthier.data.shares import largest, shares_of, taken
from luthier.data.texts import whole

BEYOND, OUTSIDE = "beyond the share of its source", "of a source that the mixture leaves out"
_PLACE = "data.steps.mix"
_SKETCH = np.dtype([("key", "u8"), ("tie", "u8"), ("origin", "u8"), ("size", "i8")])


@dataclass(frozen=True, kw_only=True)
class Mix(SetStep):
    """Shares of the sources: by weights or by their size, with replay of general data."""

    weights: Mapping[str, float] | None = field(
        default=None,
        metadata={"doc": "Share of each source by its name, in any scale; default: by size, see temperature."},
    )
    by: Literal["tokens", "rows", "characters"] = field(
        default="tokens", metadata={"doc": "What shares are counted in; tokens are those of the recipe's tokenizer."}
    )
    temperature: float = field(
        default=1.0, metadata={"doc": "Without weights, shares go as size^(1/temperature); 5 lifts small sources much."}
    )
    total: int | None = field(
        default=None,
        metadata={"doc": "Size of the mixture; default: the largest that the shares allow.", "unit": "of by"},
    )
    repeat_up_to: float = field(
        default=1.0,
        metadata={"doc": "How often a row of a scarce source may stand; 4 costs little (arXiv:2305.16264).",
                  "unit": "times"},
    )  # fmt: skip
    replay: Mapping[str, Any] | None = field(
        default=None,
        metadata={"doc": "General data against forgetting: {origins: [names], share: 0.05} of the mixture."},
    )
    others: Literal["error", "keep", "drop"] = field(
        default="error",
        metadata={"doc": "Sources that weights do not name: an error, kept beside the mixture, or dropped."},
    )

    def __post_init__(self) -> None:
        for name, weight in (self.weights or {}).items():
            if not _is_number(weight) or weight < 0:
                raise RecipeError("a weight is a number from 0", where=f"{_PLACE}.weights.{name}", value=weight)
        if self.weights is not None and not sum(self.weights.values()):
            raise RecipeError(
                "no source has a weight", where=f"{_PLACE}.weights", remedy="give one of them more than 0"
            )
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise RecipeError("a temperature is above 0", where=f"{_PLACE}.temperature", value=self.temperature)
        if self.weights is not None and self.temperature != 1:
            raise RecipeError("weights and a temperature say one thing twice", where=f"{_PLACE}.temperature",
                              remedy="keep one of them")  # fmt: skip
        if self.total is not None and self.total < 1:
            raise RecipeError("a mixture has at least one row", where=f"{_PLACE}.total", value=self.total)
        if not _is_number(self.repeat_up_to) or self.repeat_up_to < 1:
            raise RecipeError("a row stands at least once", where=f"{_PLACE}.repeat_up_to", value=self.repeat_up_to)
        self._replayed()

    @property
    def counts_tokens(self) -> bool:
        return self.by == "tokens"

    def sketch(self, room: Room) -> Sketcher:
        sizes = _counter(self.by, room)
        seed = room.seed.to_bytes(8, "little", signed=False)

        def sketched(items: Sequence[Item]) -> NDArray[Any]:
            texts = [whole(item.record) for item in items]
            made_B = np.zeros(len(items), _SKETCH)
            made_B["key"] = [_hash(text, seed) for text in texts]
            made_B["tie"] = [_hash(str(item.record.source)) for item in items]
            made_B["origin"] = [_hash(item.origin) for item in items]
            made_B["size"] = sizes(texts)
            return made_B

        return sketched

    def decide(self, sketches_B: NDArray[Any], rows: Rows, room: Room) -> Decision:
        members = _members(sketches_B, rows)
        amounts = {name: int(sketches_B["size"][rows_].sum()) for name, rows_ in members.items()}
        shares = self._shares(amounts)
        size = self._size(amounts, shares)
        copies_B = np.ones(len(sketches_B), np.int64)
        reason_B = np.zeros(len(sketches_B), np.int64)
        figures: dict[str, Any] = {}
        for name, rows_ in members.items():
            if name in shares:
                ordered = rows_[np.lexsort((sketches_B["tie"][rows_], sketches_B["key"][rows_]))]
                copies_B[ordered] = taken(sketches_B["size"][ordered], round(size * shares[name]))
            elif self.others == "drop":
                copies_B[rows_], reason_B[rows_] = 0, 1
            got = int((copies_B[rows_] * sketches_B["size"][rows_]).sum())
            figures[name] = {"rows": len(rows_), self.by: amounts[name], "rows_taken": int(copies_B[rows_].sum()),
                             "taken": got, "most_copies": int(copies_B[rows_].max())}  # fmt: skip
        return Decision(copies_B, reason_B, (BEYOND, OUTSIDE), figures=self._figures(figures, shares, size))

    def _figures(self, figures: dict[str, Any], shares: Mapping[str, float], size: float) -> dict[str, Any]:
        inside = sum(figures[name]["taken"] for name in shares)
        for name, share in shares.items():
            figures[name]["share_asked"] = round(share, 6)
            figures[name]["share_realised"] = round(figures[name]["taken"] / inside, 6) if inside else 0.0
        return {"by": self.by, "asked": round(size), "taken": inside, "sources": figures}

    def _shares(self, amounts: Mapping[str, int]) -> dict[str, float]:
        """What part of the mixture each source is; sources outside of it are not there."""
        replayed, part = self._replayed()
        named = [*(self.weights or {}), *replayed]
        for name in named:
            if name not in amounts:
                self._unknown(name, amounts)
        rest = {name: n for name, n in amounts.items() if name not in replayed}
        unnamed = [name for name in rest if self.weights is not None and name not in self.weights]
        if unnamed and self.others == "error":
            raise RecipeError("a source has no weight", where=f"{_PLACE}.weights", value=unnamed[0],
                              remedy="give it one (0 leaves it out), or say others: keep or drop")  # fmt: skip
        made = shares_of(rest, self.weights, self.temperature)
        if replayed and not made:
            raise RecipeError("replay needs rows that it stands beside", where=f"{_PLACE}.replay.origins",
                              remedy="leave a source out of it")  # fmt: skip
        beside = shares_of({name: amounts[name] for name in replayed}, None, 1.0)
        made = {name: share * (1 - part) for name, share in made.items()}
        return {**made, **{name: share * part for name, share in beside.items()}}

    def _size(self, amounts: Mapping[str, int], shares: Mapping[str, float]) -> float:
        most, scarce = largest(amounts, shares, self.repeat_up_to)
        if self.total is None:
            if most == 0 and any(amounts.values()):
                raise DataError("a source of the mixture has no rows left", where=_PLACE, value=scarce,
                                remedy="give it weight 0, or look at what the steps before dropped")  # fmt: skip
            return most
        if self.total * (1 - 1e-9) > most:
            raise DataError(
                f"the mixture cannot be so large: `{scarce}` has {amounts[scarce]} {self.by}",
                where=f"{_PLACE}.total", value=self.total,
                remedy=f"at most {int(most)} with these shares; or raise repeat_up_to",
            )  # fmt: skip
        return float(self.total)

    def _replayed(self) -> tuple[tuple[str, ...], float]:
        """Names and share of `replay`, checked."""
        if self.replay is None:
            return (), 0.0
        where = f"{_PLACE}.replay"
        for name in self.replay:
            if name not in ("origins", "share"):
                raise RecipeError("unknown field of replay", where=f"{where}.{name}", remedy="fields: origins, share")
        said, share = self.replay.get("origins"), self.replay.get("share", 0.05)
        origins = (said,) if isinstance(said, str) else tuple(said or ())
        if not origins or not all(isinstance(name, str) for name in origins) or len(set(origins)) < len(origins):
            raise RecipeError("replay names its sources, each once", where=f"{where}.origins", value=said)
        if not _is_number(share) or not 0 < share < 1:
            raise RecipeError("a share lies between 0 and 1", where=f"{where}.share", value=share)
        twice = [name for name in origins if name in (self.weights or {})]
        if twice:
            raise RecipeError("a source is in the weights and in replay", where=f"{where}.origins", value=twice[0],
                              remedy="name it once")  # fmt: skip
        return origins, float(share)

    def _unknown(self, name: str, amounts: Mapping[str, int]) -> None:
        close = difflib.get_close_matches(name, amounts, n=1)
        remedy = f"did you mean `{close[0]}`?" if close else f"sources with rows: {', '.join(amounts) or 'none'}"
        section = "weights" if name in (self.weights or {}) else "replay.origins"
        raise RecipeError("no row comes from that source", where=f"{_PLACE}.{section}", value=name, remedy=remedy)


def _members(sketches_B: NDArray[Any], rows: Rows) -> dict[str, NDArray[np.int64]]:
    """The rows of each source, sources by name."""
    _, firsts, which_B = np.unique(sketches_B["origin"], return_index=True, return_inverse=True)
    names = [rows[int(first)].origin for first in firsts]
    return {names[at]: np.flatnonzero(which_B == at) for at in sorted(range(len(names)), key=names.__getitem__)}


def _counter(by: str, room: Room) -> Callable[[list[str]], list[int]]:
    if by == "rows":
        return lambda texts: [1] * len(texts)
    if by == "characters":
        return lambda texts: [len(text) for text in texts]
    if room.tokenizer is None:
        raise RecipeError("tokens are counted with the recipe's tokenizer, and there is none", where=f"{_PLACE}.by",
                          remedy="set model.path, or by: characters")  # fmt: skip
    tokenizer = room.tokenizer()
    return lambda texts: [len(ids) for ids in _ids(tokenizer, texts)]


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text, nothing added by the tokenizer. Lone surrogates, which none takes, count as a question mark."""
    clean = [text.encode("utf-8", "replace").decode() for text in texts]
    made: list[list[int]] = tokenizer(clean, add_special_tokens=False, verbose=False)["input_ids"] if clean else []
    return made


def _hash(text: str, key: bytes = b"") -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest(), "little")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
