"""The laws of every file in data/steps: a new step is tested here without a line written for it.

    adds up        read + added = kept + each reason; nothing but kept rows comes out
    by rows        the size of the batches and the cut into parts change nothing
    again          the same rows, the same result: no clock, no random state, no order of a set
    plain          it can be sent to another process; what it says is short words of ours, never content of a row
    on disk        a build of it gives the rows that memory gives, on one process and on two
    every kind     rows of all kinds go through, or the step refuses them by name

A step that cannot be made without fields (a model, an endpoint, names of sources) says here which fields the laws use.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.fake_endpoint import FakeEndpoint, number, scored
from luthier.contracts.errors import LuthierError
from luthier.contracts.record import Chat, Completion, Judged, Pair, Source, Text
from luthier.contracts.step import Item, Room, SetStep, Step
from luthier.data import applied, built, passes
from luthier.data.applied import apply
from luthier.data.build import BuildSpec, build
from luthier.data.tally import Tally
from luthier.data.texts import whole
from luthier.recipe import resolve
from luthier.recipe.recipe import DataSource

MARK = "zebra"  # a word of every row: it must never stand in a reason
FIELDS: dict[str, dict[str, Any]] = {  # step -> fields that the laws give it; "@name" is a file of the test
    "decontaminate": {"against": ["@held_out"]},
    "semantic_dedup": {"model": "@models/potion-base-4m-int8"},
    "diversify": {"model": "@models/potion-base-4m-int8", "keep": 0.5},
    "judge": {"endpoint": "@endpoint", "least": 2},
    "expand": {"endpoint": "@endpoint", "rows": 7},
    "reward_score": {"model": "@reward", "top": 0.5},
}


def rows_of(kinds: bool = True) -> list[Item]:
    """Sixty rows: some twice, some nearly, some empty-looking, in two languages; with all kinds of records."""
    items: list[Item] = []
    for i in range(60):
        at = Source(("one.jsonl", "two.jsonl")[i % 2], i + 1)
        asked = f"What does the {MARK} number {i % 25} do at noon? Write to {MARK}{i}@example.org."
        said = f"It drinks water and number {i} runs away over the hill, as it does on every day of the week." * (
            i % 3 + 1
        )
        if i % 9 == 0:
            asked, said = f"斑马{i}号{MARK}在中午做什么?", f"它喝水,然后{i}号跑过山丘。"
        chat = Chat(({"role": "user", "content": asked}, {"role": "assistant", "content": said}), at)
        record: Any = chat
        if kinds and i % 5 == 1:
            record = Completion(asked + "\n", said, at)
        elif kinds and i % 5 == 2:
            record = Text(f"{asked} {said}", at)
        elif kinds and i % 5 == 3:
            other = Chat((chat.messages[0], {"role": "assistant", "content": f"No {i}."}), at)
            record = Pair(chat, other, at, 0.5)
        elif kinds and i % 5 == 4:
            record = Judged(chat, i % 2 == 0, at)
        items.append(Item(record, ("one", "two")[i % 2], {"quality": float(i % 4)}))
    return items


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Step]:
    """A step by name, with the fields that it needs."""
    folder = tmp_path_factory.mktemp("laws")

    def make(name: str) -> Step:
        fields = {key: _given(value, folder, request) for key, value in FIELDS.get(name, {}).items()}
        step: Step = resolve.build("steps", {"name": name, **fields})
        return step

    return make


def _given(value: Any, folder: Path, request: pytest.FixtureRequest) -> Any:
    if not isinstance(value, str) or not value.startswith("@"):
        return [_given(one, folder, request) for one in value] if isinstance(value, list) else value
    if value == "@held_out":
        path = folder / "held_out.jsonl"
        path.write_text(json.dumps({"prompt": "Nothing like it.", "completion": " Here at all."}) + "\n", "utf-8")
        return str(path)
    if value == "@endpoint":
        return request.getfixturevalue("endpoint")
    if value == "@reward":
        (folder / "reward").mkdir(exist_ok=True)
        return str(folder / "reward")
    return str(request.getfixturevalue("shared_data")(value[1:]))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[dict[str, Any]]:
    """An endpoint that marks rows and writes new ones."""

    def say(request: Mapping[str, Any]) -> Any:
        if not request["messages"][0]["content"].startswith("You write"):
            return scored(request)
        words = f"tell of thing{number(request)} and of nothing else"
        return {"tasks": [{"request": f"{words} {place * words}", "answer": "It is new."} for place in range(2)]}

    with FakeEndpoint(say) as server:
        yield server.section()


def scorer(model: str) -> Any:
    """The reward of a row is its length."""
    return lambda records: [float(len(whole(record))) for record in records]


@pytest.fixture(params=resolve.names("steps"))
def step(request: pytest.FixtureRequest, made: Callable[[str], Step]) -> Step:
    return made(request.param)


def room(tmp_path: Path) -> Room:
    return Room(tmp_path / "cache", seed=3, tokenizer=_Words, scorer=scorer)


class _Words:
    """A tokenizer that counts words."""

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        one = isinstance(texts, str)
        ids = [list(range(len(text.split()))) for text in ([texts] if one else texts)]
        return {"input_ids": ids[0] if one else ids}


def test_adds_up(step: Step, tmp_path: Path) -> None:
    items = rows_of()
    kept, (tally,) = apply([step], items, room(tmp_path))
    tally.assert_balanced()
    assert tally.read == len(items) and tally.kept == len(kept)
    json.dumps(tally.to_json(), allow_nan=False)
    assert Tally.from_json(json.loads(json.dumps(tally.to_json()))) == tally
    for item in kept:
        assert built.item(json.loads(built.line(item))).notes == json.loads(json.dumps(dict(item.notes)))


def test_batches_change_nothing(step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for size in (1, 7, 512):
        monkeypatch.setattr(applied, "batches", lambda rows, size=size: _cut(rows, size))
        kept, (tally,) = apply([step], rows_of(), room(tmp_path))
        seen.append(([built.line(item) for item in kept], tally.to_json()))
    assert seen[0] == seen[1] == seen[2]


def test_again(step: Step, tmp_path: Path) -> None:
    assert apply([step], rows_of(), room(tmp_path)) == apply([step], rows_of(), room(tmp_path))


def test_can_be_sent_and_says_no_content(step: Step, tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(step)) == step
    _, (tally,) = apply([step], rows_of(), room(tmp_path))
    for words in (*tally.left, *tally.changed, *tally.added):
        assert words and MARK not in words and len(words) < 100


def test_on_disk_as_in_memory(step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if step.counts_tokens:
        pytest.skip("counts tokens: its tokenizer is opened by the recipe, which tests of the verb show")
    items = [item for item in rows_of() if not isinstance(item.record, Judged)]
    sources = []
    for kind in (Chat, Completion, Text, Pair):
        path = tmp_path / f"{kind.__name__}.jsonl"
        lines = [built.line(Item(i.record, "", {})) for i in items if isinstance(i.record, kind)]
        path.write_bytes(b"".join(lines))
        sources.append(DataSource(path=str(path), name=("one", "two")[len(sources) % 2]))
    same = [
        Item(record, str(source.name)) for source in sources for record in applied.read(source.path)
    ]  # fmt: skip
    kept, tallies = apply([step], same, Room(tmp_path / "cache", seed=3, scorer=scorer))
    monkeypatch.setattr(passes, "PART_ROWS", 5)
    spec = BuildSpec(tuple(sources), (step,), seed=3, scorer=scorer)
    if not kept:
        with pytest.raises(LuthierError, match="0 rows left"):
            build(spec, tmp_path / "out")
        return
    one = build(spec, tmp_path / "out", workers=1)
    assert one.rows.read_bytes().splitlines(keepends=True) == [built.line(item) for item in kept]
    (ledger,) = one.ledger["steps"]
    assert ledger == json.loads(json.dumps(tallies[0].to_json()))


def test_nothing_in_nothing_out(step: Step, tmp_path: Path) -> None:
    kept, (tally,) = apply([step], [], room(tmp_path))
    assert (kept == [] and tally.read == tally.kept == 0) or isinstance(step, SetStep)
    if isinstance(step, SetStep):
        assert len(np.asarray(step.sketch(room(tmp_path))([]))) == 0


def _cut(rows: Any, size: int) -> Any:
    rows = list(rows)
    return iter([rows[at : at + size] for at in range(0, len(rows), size)])
