"""Rows of preferences: every shape that users have becomes the same Pair or Judged, and wrong rows name their field."""

from __future__ import annotations

import math
from typing import Any

import pytest

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Completion, Judged, Pair, Source
from luthier.data.detect import named, pick
from luthier.data.pairs import prompt_length

AT = Source("pairs.jsonl", 4)
ASKED = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def read(row: dict[str, Any]) -> Any:
    return pick([(row, AT)]).read(row, AT)


def said(side: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in side.messages]


TURNS = [
    {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [ASKED], "chosen": "good", "rejected": "bad"},
    {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "q", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD]},
    {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "score_chosen": 9.0, "score_rejected": 1.0},
    {"chosen_messages": [ASKED, GOOD], "rejected_messages": [ASKED, BAD]},
    {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    {"conversations": [{"from": "human", "value": "q"}], "chosen": "good", "rejected": "bad"},
    {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    {"messages": [ASKED, GOOD], "rejected_response": "bad"},
    {"messages": [ASKED, GOOD], "rejected_messages": [ASKED, BAD]},
    {"system": "", "query": "q", "response": "good", "rejected_response": "bad"},
    {"system": "", "question": "q", "chosen": "good", "rejected": "bad"},
    {"input": {"messages": [ASKED], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
]


@pytest.mark.parametrize("row", TURNS)
def test_conversations_of_all_shapes_are_one_pair(row: dict[str, Any]) -> None:
    pair = read(row)
    assert isinstance(pair, Pair) and pair.source == AT and pair.margin is None
    assert said(pair.chosen) == [("user", "q"), ("assistant", "good")]
    assert said(pair.rejected) == [("user", "q"), ("assistant", "bad")]


def test_system_tools_margin_and_weights_are_carried() -> None:
    row = {"prompt": [SYSTEM, ASKED], "chosen": [{**GOOD, "weight": 0.5}], "rejected": [BAD], "tools": [TOOL]}
    pair = read({**row, "margin": 2})
    assert pair.margin == 2.0 and pair.chosen.tools == pair.rejected.tools == (TOOL,)
    assert said(pair.chosen)[0] == ("system", "s") and pair.chosen.weights == (None, None, 0.5)
    openai = read({
        "input": {"messages": [ASKED], "tools": [TOOL], "parallel_tool_calls": True},
        "preferred_output": [GOOD], "non_preferred_output": [BAD],
    })  # fmt: skip
    assert openai.chosen.tools == (TOOL,)
    for row in (
        {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
        {"system": "s", "prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"system": "s", "instruction": "q", "chosen": "good", "rejected": "bad"},
    ):
        assert said(read(row).chosen) == [("system", "s"), ("user", "q"), ("assistant", "good")]


def test_tool_results_that_differ_belong_to_the_answers() -> None:
    call, one, other = {"role": "assistant", "tool_calls": [CALL]}, "1", "2"
    sides = [[ASKED, call, {"role": "tool", "content": text}, GOOD] for text in (one, other)]
    pair = read({"chosen": sides[0], "rejected": sides[1]})
    assert [message["role"] for message in pair.chosen.messages] == ["user", "assistant", "tool", "assistant"]


HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "p ", "chosen": "x", "rejected": "y"}, "p ", "x", "y"),
        ({"question": "p", "response_j": " x", "response_k": " y"}, "p", " x", " y"),
        ({"chosen": HH + " I do", "rejected": HH + " I do not"}, HH, " I do", " I do not"),
        ({"chosen": HH + " same x", "rejected": HH + " same y"}, HH, " same x", " same y"),
        ({"chosen": "What is it? Yes", "rejected": "What is it? Yellow"}, "What is it?", " Yes", " Yellow"),
        ({"chosen": "It is 1", "rejected": "It is 17"}, "It is", " 1", " 17"),
        ({"chosen": "foo bar", "rejected": "foo barred"}, "foo", " bar", " barred"),
    ],
)
def test_texts_stay_raw_and_their_common_prompt_is_cut_at_a_word(
    row: dict[str, Any], prompt: str, chosen: str, rejected: str
) -> None:
    assert read(row) == Pair(Completion(prompt, chosen, AT), Completion(prompt, rejected, AT), AT)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, GOOD], "label": True},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}], "kto_tag": True},
        {"instruction": "q", "input": "", "output": "good", "kto_tag": True},
        {"prompt": [ASKED], "completion": [GOOD], "label": "True"},
    ],
)
def test_judged_answers(row: dict[str, Any]) -> None:
    judged = read(row)
    assert isinstance(judged, Judged) and judged.desirable is True and isinstance(judged.answer, Chat)
    assert said(judged.answer) == [("user", "q"), ("assistant", "good")]
    assert read({"prompt": "q", "completion": "bad", "label": False}) == Judged(Completion("q", "bad", AT), False, AT)


SECRET = "very private words"
MINE = {"role": "user", "content": SECRET}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "p", "chosen": SECRET, "rejected": SECRET}, "rejected", "the same"),
    ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [GOOD]}, "rejected", "the same"),
    ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]}, "rejected", "the same"),
    ({"prompt": "p", "chosen": "", "rejected": SECRET}, "chosen", "empty"),
    ({"prompt": "p", "chosen": SECRET, "rejected": "  "}, "rejected", "white space"),
    ({"prompt": "p", "chosen": SECRET, "rejected": None}, "rejected", "not a text"),
    ({"prompt": "p", "chosen": 5, "rejected": SECRET}, "chosen", "int"),
    ({"prompt": "p", "chosen": [GOOD], "rejected": SECRET}, "rejected", "both as texts"),
    ({"prompt": "p", "chosen": [], "rejected": [BAD]}, "chosen", "list"),
    ({"prompt": "", "chosen": SECRET, "rejected": "b"}, "prompt", "empty"),
    ({"prompt": 3, "chosen": SECRET, "rejected": "b"}, "prompt", "int"),
    ({"chosen": [ASKED, {"content": SECRET}], "rejected": [ASKED, BAD]}, "chosen[1].role", "null"),
    ({"chosen": [ASKED, {"role": "elf", "content": SECRET}], "rejected": [ASKED, BAD]}, "chosen[1].role", "'elf'"),
    ({"chosen": [ASKED, GOOD], "rejected": [MINE, BAD]}, "", "different prompts"),
    ({"chosen": [ASKED, GOOD, MINE, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]}, "", "different prompts"),
    ({"chosen": [SYSTEM, ASKED, GOOD], "rejected": [ASKED, BAD]}, "", "different prompts"),
    ({"chosen": [ASKED, GOOD, MINE], "rejected": [ASKED, BAD]}, "chosen[2].role", "last turn"),
    ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [MINE]}, "prompt+rejected[1].role", "join the two turns"),
    ({"prompt": [ASKED, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "prompt+chosen[2].role", "join the two turns"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "chosen", "no prompt"),
    ({"chosen": SECRET, "rejected": "other"}, "chosen", "no common prompt"),
    ({"chosen": HH, "rejected": HH + " x"}, "chosen", "empty"),
    ({"prompt": "p", "chosen": SECRET, "rejected": "b", "margin": "2"}, "margin", "str"),
    ({"prompt": "p", "chosen": SECRET, "rejected": "b", "margin": math.nan}, "margin", "float"),
    ({"prompt": "p", "chosen": SECRET, "rejected": "b", "margin": True}, "margin", "bool"),
    ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD], "tools": SECRET}, "tools", "not JSON"),
    ({"conversations": [{"from": "elf", "value": "q"}], "chosen": SECRET, "rejected": "b"},
     "conversations[0].from", "'elf'"),
    ({"input": {"messages": None}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
     "input.messages", "null"),
    ({"messages": [ASKED, GOOD], "rejected_response": "good"}, "rejected_messages", "the same"),
    ({"messages": [ASKED, GOOD], "rejected_response": None}, "rejected_messages", "null"),
    ({"messages": SECRET, "rejected_response": "b"}, "messages", "list of turns"),
    ({"messages": [ASKED, GOOD], "label": 1}, "label", "int"),
    ({"messages": [ASKED, GOOD], "label": None}, "label", "null"),
    ({"messages": [ASKED, GOOD], "label": SECRET}, "label", "true or false"),
    ({"messages": [ASKED], "label": True}, "messages[0].role", "last turn"),
    ({"prompt": "p", "completion": "", "label": True}, "completion", "empty"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "field", "says"), WRONG)
def test_wrong_rows_are_named_by_field(row: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    error = caught.value
    assert error.where == ("pairs.jsonl:4" + (f":{field}" if field else "")) and error.remedy
    assert says in error.line() and SECRET not in error.line()


def test_a_label_that_means_something_else_is_read_by_naming_the_format() -> None:
    row = {"messages": [ASKED, GOOD], "label": "sports"}
    assert isinstance(named("messages").read(row, AT), Chat)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_common_prompt_of_conversations_is_that_of_trl(turns: int) -> None:
    data_utils = pytest.importorskip("trl.data_utils", reason="trl is the oracle of the common prompt")
    before = [message for i in range(turns - 1) for message in ({**ASKED, "content": f"q{i}"}, GOOD)]
    row = {"chosen": [SYSTEM, *before, ASKED, GOOD], "rejected": [SYSTEM, *before, ASKED, BAD]}
    theirs, ours = data_utils.maybe_extract_prompt(row), read(row)
    prompt = len(theirs["prompt"])
    assert prompt_length(ours.chosen.messages, ours.rejected.messages) == prompt == 2 * turns
    for side in ("chosen", "rejected"):
        messages = list(getattr(ours, side).messages)
        assert (messages[:prompt], messages[prompt:]) == (theirs["prompt"], theirs[side])
