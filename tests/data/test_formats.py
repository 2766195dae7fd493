"""Formats: each shape read as its field reads it, wrong turns named by field, private text never in an error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Completion, Source, Text
from luthier.data.detect import known, named, pick, records

AT = Source("rows.jsonl", 7)
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read(row: dict[str, Any]) -> Any:
    return pick([(row, AT)]).read(row, AT)


def roles(chat: Chat) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in chat.messages]


def test_messages_with_weights_parts_and_reasoning() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]}
    thinks = {"role": "assistant", "content": "c", "weight": 0, "reasoning": "r"}
    chat = read({"messages": [parts, thinks, USER, {**ANSWER, "loss_weight": 1.0}], "tools": ""})
    assert roles(chat) == [("user", "ab"), ("assistant", "c"), ("user", "q"), ("assistant", "a")]
    assert chat.weights == (None, 0.0, None, 1.0) and chat.tools is None and chat.source == AT
    assert chat.messages[1]["reasoning_content"] == "r"
    assert read({"messages": [USER, ANSWER]}).weights is None
    assert read({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}) == read(
        {"messages": [USER, ANSWER]}
    )


@pytest.mark.parametrize("name", ["train_detail", "training_detail"])
def test_stretches_of_a_message_are_refused_by_name(name: str) -> None:
    spans = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    with pytest.raises(DataError, match=rf"rows.jsonl:7:messages\[1\].{name} .* segments"):
        read({"messages": [USER, {**ANSWER, name: spans}]})
    assert read({"messages": [USER, {**ANSWER, name: None}]}).weights is None


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
    ],
)
def test_tool_calls_have_one_form(turn: dict[str, Any]) -> None:
    result = {"role": "tool", "content": "", "tool_call_id": "1", "name": "f"}
    chat = read({"messages": [USER, turn, result, result, ANSWER], "tools": '[{"name": "f", "parameters": {}}]'})
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert chat.messages[2] == result
    assert chat.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)


def test_sharegpt_with_a_call() -> None:
    turns = [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "{}"}, {"from": "gpt", "value": "a", "weight": 0},
    ]  # fmt: skip
    chat = read({"conversations": turns, "system": "s", "tools": "[]"})
    assert roles(chat) == [("system", "s"), ("user", "q"), ("assistant", ""), ("tool", "{}"), ("assistant", "a")]
    assert chat.messages[2]["tool_calls"] == [CALL] and chat.weights == (None, None, None, None, 0.0)


def test_alpaca_prompt_completion_and_text() -> None:
    row = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["u", "v"]], "text": "t"}
    assert roles(read(row)) == [
        ("system", "s"),
        ("user", "u"),
        ("assistant", "v"),
        ("user", "i\nx"),
        ("assistant", "o"),
    ]
    assert roles(read({"instruction": "i", "input": "", "output": "o"})) == [("user", "i"), ("assistant", "o")]
    for asked, said in (("prompt", "completion"), ("question", "answer"), ("instruction", "response")):
        assert read({asked: "p", said: "c", "id": 3}) == Completion("p", "c", AT)
    both = read({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert both.weights == (0.0, 0.0, 0.0, None)
    assert read({"text": " t "}) == Text(" t ", AT)


SECRET = "very private words"
WRONG: list[tuple[list[Any], str, str]] = [
    ([], "messages", "no messages"),
    ([{"role": "wizard", "content": SECRET}], "messages[0].role", "'wizard'"),
    ([{"content": SECRET}], "messages[0].role", "null"),
    ([USER], "messages[0].role", "last turn"),
    ([USER, ANSWER, {"role": "user", "content": SECRET}], "messages[2].role", "last turn"),
    ([ANSWER], "messages[0].role", "cannot stand first"),
    ([USER, {"role": "user", "content": SECRET}, ANSWER], "messages[1].role", "join the two turns"),
    ([USER, ANSWER, {"role": "system", "content": SECRET}, USER, ANSWER], "messages[2].role", "system"),
    ([USER, ANSWER, {"role": "tool", "content": SECRET}, ANSWER], "messages[2].role", "tool_calls"),
    ([USER, {"role": "assistant", "content": "  "}], "messages[1].content", "white space"),
    ([USER, {"role": "assistant", "content": None}], "messages[1].content", "null"),
    ([USER, {"role": "assistant", "content": 5}], "messages[1].content", "int"),
    ([USER, {"role": "assistant", "content": {"a": SECRET}}], "messages[1].content", "dict"),
    ([{"role": "user", "content": [{"type": "image", "image": SECRET}]}, ANSWER], "messages[0].content[0]", "image"),
    ([USER, SECRET], "messages[1]", "str"),
    ([USER, {**ANSWER, "weight": "yes"}], "messages[1].weight", "str"),
    ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[1].tool_calls[0]", "no name"),
    (
        [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}],
        "messages[1].tool_calls[0].arguments",
        "not JSON",
    ),
    ([{**USER, "tool_calls": [CALL]}, ANSWER], "messages[0].tool_calls", "assistant"),
]


@pytest.mark.parametrize(("messages", "field", "says"), WRONG)
def test_wrong_turns_are_named_by_field(messages: list[Any], field: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read({"messages": messages})
    line = caught.value.line()
    assert f"rows.jsonl:7:{field} " in line + " " and says in line and SECRET not in line


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "elf", "value": SECRET}]},
            "conversations[1].from",
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]}, "conversations[1].value"),
        ({"conversations": None}, "conversations"),
        ({"instruction": "i", "output": ""}, "output"),
        ({"instruction": "i", "output": "o", "history": [SECRET]}, "history[0]"),
        ({"prompt": "p", "completion": None}, "completion"),
        ({"prompt": 3, "completion": SECRET}, "prompt"),
        ({"text": "\n"}, "text"),
        ({"messages": [USER, ANSWER], "tools": SECRET}, "tools"),
    ],
)
def test_wrong_fields_of_other_formats(row: dict[str, Any], field: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert caught.value.where == f"rows.jsonl:7:{field}" and SECRET not in caught.value.line()


def test_one_format_per_file() -> None:
    rows = [({"text": "a"}, Source("f", 1)), ({"prompt": "p", "completion": "c"}, Source("f", 2)), ({"text": "b"}, AT)]
    bad: list[DataError] = []
    found = list(records(iter(rows), lambda error, _: bad.append(error)))
    assert [record.source.line for record in found] == [1, 7]
    assert [error.where for error in bad] == ["f:2"] and "prompt, completion" in bad[0].line()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"a": 1}, "alpaca: instruction"),
        ({"prompt": "p", "chosen": "a"}, "preference: chosen rejected"),
        ({}, "no column"),
    ],
)
def test_unknown_columns_are_listed(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        pick([(row, AT)])


def test_every_format_is_found_by_its_file() -> None:
    names = ["tokens", "preference", "stepwise", "unpaired", "segments", "messages", "sharegpt", "alpaca",
             "query_response", "prompt_completion", "prompt_only", "text"]  # fmt: skip
    assert [item.NAME for item in known()] == names
    assert named("alpaca").NAME == "alpaca"
    with pytest.raises(DataError, match="did you mean sharegpt"):
        named("share_gpt")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", " ", "a", "user", "assistant", "[", "{}", "[1]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "function", "name"]), inner
        )
    ),
    max_leaves=6,
)
SHAPES: list[dict[str, Any]] = [
    {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [{"name": "f"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s", "tools": "[]"},
    {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["u", "v"]]},
    {"prompt": [USER], "completion": [ANSWER]},
    {"text": "t"},
    {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.5},
    {
        "prompt": [USER],
        "chosen": [ANSWER],
        "rejected": [{"role": "assistant", "content": "b"}],
        "tools": [{"name": "f"}],
    },
    {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
    {"messages": [USER, ANSWER], "label": True},
]


def test_a_turn_that_names_no_speaker_is_a_fault_beside_a_system_column_too() -> None:
    row = {"conversations": [{"content": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}
    with pytest.raises(DataError, match="role"):
        read(row)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SHAPES), st.data())
def test_any_value_anywhere_is_a_record_or_a_named_fault(shape: dict[str, Any], data: st.DataObject) -> None:
    row = copy.deepcopy(shape)
    spot: Any = row
    while True:
        at = data.draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
        if not isinstance(spot[at], dict | list) or not spot[at] or data.draw(st.booleans()):
            break
        spot = spot[at]
    spot[at] = data.draw(ANY)
    bad: list[DataError] = []
    found = list(records(iter([(row, AT)]), lambda error, _: bad.append(error)))
    assert len(found) + len(bad) == 1
    assert all(str(error.where).startswith("rows.jsonl:7") and error.remedy for error in bad)
    for record in found:
        if isinstance(record, Chat):
            assert all(isinstance(message["content"], str) for message in record.messages)
            assert record.weights is None or len(record.weights) == len(record.messages)
