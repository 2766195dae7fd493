"""Shapes beyond chats and pairs: prompts, labelled steps, segments, tokenised rows; every record written and read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.reading import ALL_KINDS, Stamp, read_file
from data.test_formats import SHAPES
from data.test_preference_formats import TURNS
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Completion, Prompt, Segments, Source, Stepwise, Tokens
from luthier.data.detect import named, pick, records
from luthier.data.encode import Encoder
from luthier.data.given import segments_row, tokens_row
from luthier.data.prepare import prepare
from luthier.data.sources import SourceReader
from luthier.data.standard import row_of
from luthier.data.vocabulary import Vocabulary
from luthier.recipe.recipe import DataSection, DataSource

AT = Source("rows.jsonl", 7)
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
NEW: list[dict[str, Any]] = [
    {"prompt": "what?", "answer": "42", "tests": [{"in": 1}]},
    {"prompt": [USER], "label": "42", "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
    {"segments": [{"label": False, "text": "Q: 1\n"}, {"label": True, "text": "2"}, {"label": False, "text": ""}]},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
    {"input_ids": [0, 5, 6, 0], "completion_mask": [0, 0, 1, 0], "attention_mask": [0, 1, 1, 0], "text": "t"},
    {"query": "q", "response": "a", "history": [["u", "v"]], "system": "s"},
    {"input": "q", "output": "a"},
    {"query": "q", "response": "good", "rejected_response": "bad", "history": [["u", "v"]]},
    {"chosen_conversations": [USER, ANSWER], "rejected_conversations": [USER, {**ANSWER, "content": "b"}]},
    {"query": "q", "response": "a", "label": True},
    {"messages": [USER, {**ANSWER, "loss": False}, USER, {**ANSWER, "loss": True}], "parallel_tool_calls": False},
]

EVERY = [row for row in (*SHAPES, *TURNS, *NEW) if row.get("rejected") != "b" or isinstance(row["chosen"], str)]


def read(row: dict[str, Any]) -> Any:
    return pick([(row, AT)]).read(row, AT)


def said(chat: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in chat.messages]


@pytest.mark.parametrize("row", EVERY)
def test_every_record_written_as_a_row_reads_back_equal(row: dict[str, Any]) -> None:
    record = read(row)
    back = json.loads(json.dumps(row_of(record)))
    assert read(back) == record
    assert row_of(read(back)) == row_of(record)


def test_what_the_new_shapes_become() -> None:
    prompt, turns, steps, segments, tokens, masked, swift, tune, pair, _, judged, loss = map(read, NEW)
    assert prompt == Prompt(AT, None, "what?", None, {"answer": "42", "tests": [{"in": 1}]})
    assert turns.messages == (USER,) and turns.columns == {"label": "42"} and turns.tools
    assert steps == Stepwise("p", ("a", "b"), (True, False), AT)
    assert segments == Segments((("Q: 1\n", False), ("2", True)), AT)
    assert tokens == Tokens((5, 6, 7), (-100, 6, 7), AT)
    assert masked == Tokens((5, 6), (-100, 6), AT)
    assert said(swift) == [("system", "s"), ("user", "u"), ("assistant", "v"), ("user", "q"), ("assistant", "a")]
    assert said(tune) == said(judged.answer) == [("user", "q"), ("assistant", "a")]
    assert said(pair.rejected) == [("user", "u"), ("assistant", "v"), ("user", "q"), ("assistant", "bad")]
    assert loss.weights == (None, 0.0, None, 1.0)
    assert isinstance(named("prompt_only").read({"messages": [USER, ANSWER, USER]}, AT), Prompt)


def test_calls_of_ms_swift_are_one_turn() -> None:
    calls = [{"role": "tool_call", "content": json.dumps({"name": "f", "arguments": {"x": x}})} for x in (1, 2)]
    result = {"role": "tool_response", "content": "r"}
    chat = read({"messages": [USER, *calls, result, ANSWER]})
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert [call["function"]["arguments"]["x"] for call in chat.messages[1]["tool_calls"]] == [1, 2]
    with pytest.raises(DataError, match=r"messages\[1\]\.content .*|not JSON"):
        read({"messages": [USER, {"role": "tool_call", "content": "{"}, result, ANSWER]})


def test_mixed_texts_and_turns_are_a_conversation() -> None:
    for row in ({"prompt": [USER], "completion": "a"}, {"prompt": "q", "completion": [ANSWER]}):
        chat = read(row)
        assert said(chat) == [("user", "q"), ("assistant", "a")] and chat.weights == (0.0, None)
    assert read({"prompt": "[{not json", "completion": "c"}) == Completion("[{not json", "c", AT)


SECRET = "very private words"


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ({"prompt": "", "answer": SECRET}, "prompt", "empty"),
        ({"prompt": [USER, ANSWER], "tools": SECRET}, "prompt[1].role", "ends with what is asked"),
        ({"prompt": "p", "completions": [SECRET], "labels": [True, False]}, "labels", "2 labels, 1 steps"),
        ({"prompt": "p", "completions": [SECRET], "labels": [1]}, "labels[0]", "int"),
        ({"prompt": "p", "completions": [], "labels": []}, "labels", "0 labels"),
        ({"prompt": "p", "completions": SECRET, "labels": [True]}, "completions", "not a list"),
        ({"segments": SECRET}, "segments", "not a list"),
        ({"segments": [SECRET]}, "segments[0]", "str"),
        ({"segments": [{"label": "yes", "text": SECRET}]}, "segments[0].label", "str"),
        ({"segments": [{"label": True, "text": None}]}, "segments[0].text", "null"),
        ({"segments": [{"label": False, "text": SECRET}]}, "segments", "no segment trains"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels", "1, input_ids 2"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "labels[0]", "label 2, token 1"),
        ({"input_ids": [1, True], "labels": [1, 1]}, "input_ids[1]", "bool"),
        ({"input_ids": [1, "2"], "labels": [1, 2]}, "input_ids[1]", "str"),
        ({"input_ids": [], "labels": []}, "input_ids", "empty list"),
        ({"input_ids": [1, 2]}, "labels", "nothing says"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1]}, "attention_mask", "1, input_ids 2"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask", "one stretch"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "labels[1]", "padding"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 2]}, "attention_mask[1]", "0 nor 1"),
        ({"input_ids": [1, 2], "completion_mask": [0, 1, 1]}, "completion_mask", "3, input_ids 2"),
        ({"query": SECRET, "response": ""}, "response", "empty"),
        ({"messages": [USER, ANSWER], "parallel_tool_calls": "no"}, "parallel_tool_calls", "str"),
    ],
)
def test_wrong_fields_are_named(row: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert caught.value.where == f"rows.jsonl:7:{field}" and says in caught.value.line()
    assert SECRET not in caught.value.line()


@pytest.mark.parametrize("row", [{"images": ["a.png"]}, {"videos": ["a"]}, {"image": {"bytes": b"x"}}])
def test_rows_with_pictures_are_refused(row: dict[str, Any]) -> None:
    bad: list[str] = []
    assert not list(
        records(iter([({"messages": [USER, ANSWER], **row}, AT)]), lambda error, _: bad.append(error.line()))
    )
    assert "only text is trained on" in bad[0]
    assert len(list(records(iter([({"text": "t", "images": [], "image": "http://x"}, AT)]), lambda e, _: None))) == 1


@pytest.fixture(scope="module")
def tok() -> Any:
    """Bytes and pairs of them, so that tokens do cross borders."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["hello world abba ab. aab 11 a b a\n\nb üé" * 3] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")


TEXTS = st.text(alphabet="ab .\nü1é", min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.booleans()), min_size=1, max_size=6))
def test_a_segments_tokens_train_where_it_does(tok: Any, parts: list[tuple[str, bool]]) -> None:
    vocabulary = Vocabulary(tok)
    text = "".join(part for part, _ in parts)
    try:
        ids_T, weights_T = segments_row(
            Segments(tuple(parts), AT), lambda piece, _: vocabulary.encode(piece), tok.decode
        )
    except DataError as error:
        said = error.what
        assert "inside a token" in said or "loses characters" in said
        return
    assert tok.decode(ids_T.tolist()) == tok.decode(vocabulary.encode(text).ids_T.tolist())
    encoded = [vocabulary.encode(part) for part, _ in parts]
    apart = np.concatenate([one.ids_T for one in encoded])
    if np.array_equal(apart, ids_T):  # no token crosses a border: weights are those of the parts, token for token
        wanted = np.concatenate([np.full(len(e), float(w)) for e, (_, w) in zip(encoded, parts, strict=True)])
        assert np.array_equal(weights_T, wanted)
    assert bool(weights_T.any()) == any(weight for _, weight in parts) or len(ids_T) != len(apart)


def test_ids_are_checked_against_the_vocabulary() -> None:
    ids_T, weights_T = tokens_row(Tokens((0, 9, 3), (-100, 9, 3), AT), 10)
    assert ids_T.tolist() == [0, 9, 3] and weights_T.tolist() == [0.0, 1.0, 1.0]
    for wrong in (10, -1, 2**70):
        with pytest.raises(DataError, match=r"rows\.jsonl:7:input_ids\[1\] .* 0 … 9"):
            tokens_row(Tokens((0, wrong), (-100, wrong), AT), 10)


def test_segments_and_tokens_train_to_the_end(tmp_path: Path, tok: Any) -> None:
    """Nothing is added and the weights are those of the rows."""
    text = "hello world"
    ids = Vocabulary(tok).encode(text).ids_T.tolist()
    rows = [{"segments": [{"label": False, "text": "hello"}, {"label": True, "text": " world"}]}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "b.jsonl").write_text(json.dumps({"input_ids": ids, "labels": [-100, *ids[1:]]}))
    section = DataSection(
        train=(DataSource(path=str(tmp_path / "a.jsonl")), DataSource(path=str(tmp_path / "b.jsonl")))
    )
    found = prepare(section, Encoder(tok, None, section), seed=0).train
    assert [list(sample.pieces[0].tokens) for sample in found] == [ids, ids]
    assert [float(w) for w in found[1].pieces[0].weights] == [0.0] + [1.0] * (len(ids) - 1)
    assert 0 < found[0].scored < len(ids)


@pytest.mark.parametrize("row", NEW[:3])
def test_objectives_refuse_by_name_what_they_cannot_train_on(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    section = DataSection(train=(DataSource(path=str(tmp_path / "a.jsonl")),))
    with pytest.raises(DataError, match=r"objective sft does not train on (prompts without|steps with)"):
        prepare(section, Stamp(), seed=0)


@pytest.mark.parametrize("row", EVERY)
def test_a_table_of_cells_gives_the_same_record(tmp_path: Path, row: dict[str, Any]) -> None:
    """Lists and objects as JSON in a CSV's cells."""
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(row)
        writer.writerow([v if isinstance(v, str) else json.dumps(v) for v in row.values()])
    record, whole = read_file(path).train_records[0], read(row)
    if isinstance(whole, Prompt):  # other columns stay text
        assert row_of(record)["prompt"] == row_of(whole)["prompt"]
    else:
        assert json.loads(json.dumps(row_of(record))) == json.loads(json.dumps(row_of(whole)))


def by(source: DataSource, rows: list[dict[str, Any]], tmp_path: Path) -> tuple[list[Any], list[str]]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = source.model_copy(update={"path": str(path)})
    left: list[str] = []
    bad: list[DataError] = []
    reader = SourceReader(source, 3)
    found = list(reader.records(str(path), lambda error, _: bad.append(error), lambda reason, _: left.append(reason)))
    if bad:
        raise bad[0]
    return found, left


def test_columns_roles_and_weights_of_a_source(tmp_path: Path) -> None:
    rows = [{"talk": [{"who": "me", "says": "q"}, {"who": "bot", "says": "a", "keep": False}], "messages": "old"}]
    source = DataSource(
        path="x", columns={"messages": "talk", "messages.role": "who", "messages.content": "says",
                           "messages.train": "keep"}, role_names={"me": "user", "bot": "assistant"},
        train_roles=("user", "assistant"),
    )  # fmt: skip
    (chat,), _ = by(source, rows, tmp_path)
    assert isinstance(chat, Chat) and said(chat) == [("user", "q"), ("assistant", "a")] and chat.weights == (1.0, 0.0)
    swapped = DataSource(path="x", columns={"prompt": "completion", "completion": "prompt"})
    assert by(swapped, [{"prompt": "p", "completion": "c"}], tmp_path)[0] == [
        Completion("c", "p", Source(str(tmp_path / "rows.jsonl"), 1))
    ]
    left_out = DataSource(path="x", columns={"system": None})
    (chat,), _ = by(left_out, [{"instruction": "i", "output": "o", "system": "s"}], tmp_path)
    assert said(chat) == [("user", "i"), ("assistant", "o")]
    with pytest.raises(DataError, match="did you mean talk"):
        by(DataSource(path="x", columns={"messages": "tallk"}), rows, tmp_path)
    with pytest.raises(DataError, match="train_roles is for conversations"):
        by(DataSource(path="x", train_roles=("user",)), [{"text": "t"}], tmp_path)


def test_shards_are_the_whole_and_limits_are_exact(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}"} for n in range(100)]
    parts = [by(DataSource(path="x", shard=f"{n}/7"), rows, tmp_path) for n in range(1, 8)]
    assert sorted(record.source.line for part, _ in parts for record in part) == list(range(1, 101))
    assert all(len(part) + len(left) == 100 and part for part, left in parts)
    found, left = by(DataSource(path="x", max_rows=30), rows, tmp_path)
    assert len(found) == 30 and len(left) == 70
    assert {record.source.line for record in found} != set(range(1, 31))
    with pytest.raises(DataError, match="no such shard"):
        by(DataSource(path="x", shard="8/7"), rows, tmp_path)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_kind_has_words(kind: str) -> None:
    from luthier.data import kinds

    assert kind in kinds._SAID
