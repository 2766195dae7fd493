"""Cleaning: each repair by itself, what it must leave alone, and the step's counts."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.row_steps import SOURCE, asked, chat, check_laws, kinds, one, plain
from luthier.contracts.record import Chat, Completion, Pair
from luthier.contracts.step import Item
from luthier.data import repairs
from luthier.data.steps.clean import EMPTY, Clean
from luthier.data.texts import whole

CODE = "Look:\n\n```python\nx\u200b = 1 \xa0 \nprint('Ã©')  \n```\nand `a\xa0b` here"


def cleaned(text: str, **fields: Any) -> str:
    item = one(Clean(**fields), plain(text)).item
    assert item is not None
    return whole(item.record)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("CafÃ© au lait â€” trÃ¨s bon", "Café au lait — très bon"),
        ("itâ€™s", "it’s"),
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚", "Привет"),
        ("ItÃ¢â‚¬â„¢s", "It’s"),  # twice
        ("Stra\xc3\x9fe", "Straße"),
        ("\xe4\xbd\xa0\xe5\xa5\xbd", "你好"),
        ("smile ðŸ˜€", "smile 😀"),
    ],
)
def test_mojibake_that_is_proved_is_undone(wrong: str, right: str) -> None:
    assert repairs.mojibake(wrong) == right


@pytest.mark.parametrize(
    "text",
    ["Café", "CAFÉ—bar", "„MENÜ“", "«É»", "Ã", "PÂ» x", "ÄÖÜ", "naïve façade", "Ünïcödé — “ok”", "São João", "Ð and Ñ"],
)
def test_what_is_not_proved_stays(text: str) -> None:
    assert repairs.mojibake(text) == text


@given(
    st.text(
        alphabet=st.characters(min_codepoint=0xA0, max_codepoint=0x24F, categories=["Ll", "Lu"]),
        min_size=2,
        max_size=20,
    )
)
def test_mojibake_is_the_inverse_of_reading_wrongly(text: str) -> None:
    wrong = "".join(raw.decode("cp1252", "ignore") or chr(raw[0]) for raw in (bytes([b]) for b in text.encode()))
    made = repairs.mojibake(wrong)
    assert made in (text, repairs.mojibake(text), wrong)  # undone, or left alone: never a third thing
    if len(text) >= 3:
        assert made != wrong or text == wrong


@given(st.text())
def test_repairs_are_done_once(text: str) -> None:
    for repair in (repairs.lines, repairs.composed, repairs.visible, repairs.spaced):
        made = repair(text)
        assert repair(made) == made
    assert repairs.composed(text) == unicodedata.normalize("NFC", text)


def test_invisible() -> None:
    assert (
        repairs.visible("a\u200bb\ufeff c\xad \x00d\x1b[31mred\x1b[0m \ud800e \u202eevil\u202c") == "ab c dred e evil"
    )
    emoji, persian, thai = "👨\u200d👩\u200d👧 ❤\ufe0f", "می\u200cخواهم", "ไป\u200bมา"
    assert [repairs.visible(text) for text in (emoji, persian, thai)] == [emoji, persian, thai]
    hebrew = "שלום \u200eabc\u200f!"
    assert repairs.visible(hebrew) == hebrew
    assert repairs.visible("x\u200dy") == "xy"


def test_spaces() -> None:
    assert repairs.spaced("a\xa0\xa0b\u202fc") == "a b c"
    assert repairs.spaced("x \ny\t\n\nz  \nhard break") == "x\ny\n\nz  \nhard break"
    assert repairs.spaced("end  \n\nnext") == "end\n\nnext"
    assert repairs.spaced("a\n\n\n\n\n\nb") == "a\n\n\nb"
    assert repairs.spaced("\xa0\xa0indented") == "  indented"
    assert repairs.spaced("　　全角缩进") == "　　全角缩进"


def test_lines() -> None:
    assert repairs.lines("a\r\nb\rc\u2028d\x85e\x0cf") == "a\nb\nc\nd\ne\nf"


def test_html_by_choice() -> None:
    text = '<p>Hello <b>you</b> &amp; <a href="x.html">me</a></p><script>var x = "<p>";</script><ul>'
    text += "<li>one</li><li>two</li></ul>"
    assert cleaned(text) == text
    assert cleaned("a &lt; b &amp;&nbsp;c &unknown; &#x41;", html="entities") == "a < b & c &unknown; A"
    assert cleaned(text, html="tags").split() == ["Hello", "you", "&", "me", "one", "two"]
    other = "<think>a</think> <EMAIL_1> List<String> a<b and c>d <|im_end|> x < y > z <tool_call>"
    assert cleaned(other, html="tags") == other


def test_code_keeps_every_byte() -> None:
    assert cleaned(CODE, html="tags") == CODE
    assert cleaned(CODE + "\xa0 \xa0x") == CODE + " x"
    assert cleaned("~~~\n\xa0\n~~~\n") == "~~~\n\xa0\n~~~\n"
    assert cleaned("    indented  code\n\tand tabs") == "    indented  code\n\tand tabs"
    assert cleaned("```\nnever closed \xa0") == "```\nnever closed \xa0"


def test_json_stays() -> None:
    text = json.dumps({"a": "x\xa0\u200by &amp;"}, ensure_ascii=False)
    assert cleaned(text, html="tags") == text


def test_edges_of_chats_only() -> None:
    item = one(Clean(), asked("  question\n", "\n\nanswer  \n")).item
    assert item is not None and isinstance(item.record, Chat)
    assert [message["content"] for message in item.record.messages] == ["question", "answer"]
    completion = Completion("Q: x\nA: ", " y", SOURCE)
    kept = one(Clean(), Item(completion)).item
    assert kept is not None and kept.record is completion
    assert one(Clean(edges=False), asked(" q", "a ")).changes == ()


def test_changes_are_counted_by_kind() -> None:
    outcome = one(Clean(html="tags"), asked("e\u0301\r\n&amp;\xa0b\u200b", "<b>CafÃ©</b>"))
    assert set(outcome.changes) == {
        "line ends unified", "mojibake undone", "Unicode composed", "HTML tags removed", "HTML entities resolved",
        "invisible characters removed", "spaces tidied",
    }  # fmt: skip
    assert one(Clean(), asked("plain", "text")).changes == ()


@pytest.mark.parametrize("blank", ["\u200b", " \xa0\n", "\ufeff\x00"])
def test_an_answer_that_was_nothing_leaves(blank: str) -> None:
    for record in kinds("Question?", blank):
        assert one(Clean(), Item(record)).reason == EMPTY, type(record).__name__
    assert one(Clean(), Item(Pair(chat("q", "a"), chat("q", blank), SOURCE))).reason == EMPTY
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert one(Clean(), Item(chat("q", "", tool_calls=[call]))).reason == ""


def test_every_switch_switches() -> None:
    text = "CafÃ©\r\ne\u0301\u200b\xa0x"
    off = dict.fromkeys(("line_ends", "mojibake", "unicode", "invisible", "spaces"), False)
    assert cleaned(text, **off) == text
    for name in off:
        assert cleaned("CafÃ©" if name == "mojibake" else text, **{**off, name: True}) != text, name


@given(st.text(alphabet='aé \xa0\u200b\r\n`~&;<>bpÃ©{}"', max_size=40), st.sampled_from(["keep", "entities", "tags"]))
def test_cleaning_twice_is_cleaning_once(text: str, html: Any) -> None:
    if html != "keep":
        return  # &amp;amp; is one step further each time
    outcome = one(Clean(), plain(text + "x"))
    assert outcome.item is not None
    assert one(Clean(), outcome.item).changes == ()


def test_laws() -> None:
    texts = ["plain", "CafÃ©\u200b", CODE, "\u200b", " x ", '{"a": 1}', "<p>x</p>", "a\r\nb"]
    items = [Item(record, "rows") for text in texts for record in kinds(text, text)] * 3
    check_laws(Clean(), items)
    check_laws(Clean(html="tags", edges=False), items)
