"""Personal data: labelled rows of ours (D17), what masking must not break, numbers against other readings of them."""

from __future__ import annotations

import ast
import ipaddress
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bench.data.labelled_pii import Score, rows, score
from hypothesis import given, settings
from hypothesis import strategies as st

from data.row_steps import SOURCE, chat, check_laws, kinds, one, plain
from luthier.contracts.errors import RecipeError
from luthier.contracts.record import Chat, Completion, Pair
from luthier.contracts.step import Item
from luthier.data import check_digits
from luthier.data.applied import read
from luthier.data.personal import FINDERS, hits
from luthier.data.steps.pii import KINDS, Pii
from luthier.data.texts import spoken, whole

FOLDER = Path(__file__).parent / "pii"
SECRET = "sk-" + "a1B2c3D4e5F6g7H8i9J0k1L2"


def masked(text: str, **fields: Any) -> str:
    item = one(Pii(**fields), plain(text)).item
    assert item is not None
    return whole(item.record)


def scored(name: str) -> Score:
    return score(rows(FOLDER / name), lambda text: hits(text, KINDS))


@pytest.mark.parametrize("name", ["labelled.jsonl", "unseen.jsonl", "third.jsonl"])
def test_labelled_rows(name: str) -> None:
    found = scored(name)
    assert found.recall >= 0.98, found.missed
    assert found.precision >= 0.95, found.wrong
    assert set(found.right) == set(KINDS), "every kind is among the rows"


def test_there_are_300_rows_and_half_of_them_hold_nothing() -> None:
    labelled = rows(FOLDER / "labelled.jsonl")
    assert len(labelled) >= 300
    assert sum(not row.wanted for row in labelled) >= 150


def test_files_hold_no_secret_that_a_scanner_would_take_for_one() -> None:
    for path in FOLDER.glob("*.jsonl"):
        assert not re.search(r"(?:ghp_|sk-|AKIA|AIza|xoxb-)[A-Za-z0-9]{16}", path.read_text("utf-8"))


@pytest.mark.parametrize(
    ("file", "most"),
    [
        ("gsm8k/test.jsonl", 0.0),
        ("llamafactory/alpaca_en_demo.json", 0.005),
        ("llamafactory/alpaca_zh_demo.json", 0.005),
    ],
)
def test_ordinary_rows_are_left_alone(shared_data: Callable[[str], Path], file: str, most: float) -> None:
    records = list(read(str(shared_data(f"raw/{file}"))))
    hit = [record for record in records if any(hits(text, KINDS) for _, text in spoken(record))]
    assert len(hit) <= most * len(records), [str(record.source) for record in hit]


def test_one_value_has_one_number_all_through_the_row() -> None:
    row = chat("Write to ann@firm.com or ben@firm.com.", "Done: BEN@firm.com", "And ann@firm.com?", "Also.",
               reasoning_content="ben@firm.com, then +1 212-555-0147")  # fmt: skip
    outcome = one(Pii(), Item(row))
    assert outcome.item is not None
    texts = [text for _, text in spoken(outcome.item.record)]
    assert texts == [
        "Write to <EMAIL_1> or <EMAIL_2>.", "Done: <EMAIL_2>", "And <EMAIL_1>?", "<EMAIL_2>, then <PHONE_1>", "Also.",
    ]  # fmt: skip
    assert outcome.item.notes == {"personal": {"email": 2, "phone": 1}}
    assert outcome.changes == ("e-mail address masked", "telephone number masked")


def test_both_sides_of_a_pair_have_the_same_numbers() -> None:
    ask = "Mail x@a.org and y@a.org"
    outcome = one(Pii(), Item(Pair(Completion(ask, " y@a.org", SOURCE), Completion(ask, " x@a.org", SOURCE), SOURCE)))
    assert outcome.item is not None and isinstance(outcome.item.record, Pair)
    chosen, rejected = outcome.item.record.chosen, outcome.item.record.rejected
    assert isinstance(chosen, Completion) and isinstance(rejected, Completion)
    assert (chosen.prompt, chosen.completion) == ("Mail <EMAIL_1> and <EMAIL_2>", " <EMAIL_2>")
    assert (rejected.prompt, rejected.completion) == ("Mail <EMAIL_1> and <EMAIL_2>", " <EMAIL_1>")


def test_a_row_that_was_masked_before_keeps_its_placeholders() -> None:
    once = masked("x@a.org wrote y@a.org")
    assert once == masked(once) == "<EMAIL_1> wrote <EMAIL_2>"
    assert masked("<EMAIL_1> wrote y@a.org, z@a.org") == "<EMAIL_1> wrote <EMAIL_2>, <EMAIL_3>"


def test_two_spellings_of_one_number_are_one() -> None:
    assert masked("tel +86 138 1234 5678, mobile 13812345678") == "tel <PHONE_1>, mobile <PHONE_1>"
    assert masked("4111 1111 1111 1111 = card 4111-1111-1111-1111") == "<CARD_1> = card <CARD_1>"


def arguments(value: Any) -> Chat:
    call = {"type": "function", "function": {"name": "call", "arguments": value}}
    return Chat(
        ({"role": "user", "content": "Call him"}, {"role": "assistant", "content": "", "tool_calls": [call]}), SOURCE
    )


def test_arguments_of_tools_are_masked_and_stay_what_they_are() -> None:
    given_ = {"to": "13812345678", "number": 13812345678, "times": 3, "deep": [{"mail": "a@b.org"}], "on": True}
    outcome = one(Pii(), Item(arguments(given_)))
    assert outcome.item is not None and isinstance(outcome.item.record, Chat)
    function = outcome.item.record.messages[1]["tool_calls"][0]["function"]
    assert function == {
        "name": "call",
        "arguments": {
            "to": "<PHONE_1>",
            "number": "<PHONE_1>",
            "times": 3,
            "deep": [{"mail": "<EMAIL_1>"}],
            "on": True,
        },
    }


@pytest.mark.parametrize(
    "text",
    [
        '{"phone": 13812345678, "ids": [13812345678, 13987654321], "mail": "a@b.org"}',
        '[13812345678, {"card": 4111111111111111}]',
        '{"a": {"key": "' + SECRET + '", "ip": "203.0.113.9"}}',
    ],
)
def test_json_stays_json(text: str) -> None:
    made = masked(text)
    assert made != text and "1381234" not in made
    json.loads(made)


@pytest.mark.parametrize(
    "code",
    [
        'phone = 13812345678\nmail = "a@b.org"\nprint(phone, mail)\n',
        "contacts = {'ann': '+1 212-555-0147', 'ben': \"ben@firm.com\"}\n",
        'client = Client(key="' + SECRET + '", host="203.0.113.9")\n',
        "y = q @ k.T\nz = x[1::2] + x[::3]\nw = a@b\n@decorator\ndef f(x: int) -> int:\n    return 10 ** 11 + "
        "12345678901\n",
    ],
)
def test_code_stays_code(code: str) -> None:
    ast.parse(code)
    ast.parse(masked(code))


def test_control_strings_stay() -> None:
    text = "<|im_start|>user\n<think>x</think> [INST] <s> <|eot_id|> <start_of_turn>model {{name}} <tool_call>{}"
    assert masked(text) == text


def test_drop_report_and_kinds() -> None:
    item = plain("mail a@b.org from 203.0.113.9")
    assert one(Pii(action="drop"), item).reason == "holds an e-mail address"
    assert one(Pii(action="drop", kinds=("ip",)), item).reason == "holds an IP address"
    assert one(Pii(action="drop", kinds=("phone",)), item).reason == ""
    reported = one(Pii(action="report"), item)
    assert reported.item is not None and reported.item.record == item.record
    assert reported.item.notes == {"personal": {"email": 1, "ip": 1}}
    assert reported.changes == ("e-mail address found", "IP address found")


def test_what_is_allowed_stays() -> None:
    text = "help@our.org and eve@other.org"
    assert masked(text, allow=("@our.org",)) == "help@our.org and <EMAIL_1>"
    assert masked(text, allow=("Help@our.org", "eve@other.org")) == text
    assert masked("ping 192.168.1.7 and 8.8.4.4", private_ips=False) == "ping 192.168.1.7 and <IP_1>"
    assert masked("a@b.org", placeholder="[{kind} {n}]") == "[EMAIL 1]"


def test_wallets_are_looked_for_by_choice() -> None:
    text = "send to 1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN2 or bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4"
    assert masked(text) == text
    assert masked(text, kinds=("wallet",)) == "send to <WALLET_1> or <WALLET_2>"
    assert masked(text.replace("NVN2", "NVN3").replace("8f3t4", "8f3t5"), kinds=("wallet",)).count("WALLET") == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"kinds": ("mail",)},
        {"placeholder": "<{kind}>"},
        {"placeholder": '"{n}"'},
        {"placeholder": "{n}\n"},
        {"placeholder": "{n}\\"},
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        Pii(**fields)
    assert "data.steps.pii." in caught.value.line()


@given(st.text(alphabet="ab1234567890 .-+()@:/=", max_size=80))
@settings(max_examples=300)
def test_hits_are_in_order_and_masking_removes_them(text: str) -> None:
    found = hits(text, tuple(FINDERS))
    assert all(a.end <= b.start for a, b in pairwise(found))
    assert all(0 <= hit.start < hit.end <= len(text) for hit in found)
    values = {text[hit.start : hit.end] for hit in found if hit.kind == "email"}
    assert not any(value in masked(text) for value in values)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=24))
def test_luhn_as_the_textbook_says(digits: list[int]) -> None:
    odd, even = digits[-1::-2], digits[-2::-2]
    wanted = (sum(odd) + sum(2 * d - 9 * (d > 4) for d in even)) % 10 == 0
    assert check_digits.luhn("".join(map(str, digits))) == wanted


@given(st.sampled_from(["DE89370400440532013000", "GB29NWBK60161331926819", "NO9386011117947"]), st.data())
def test_one_wrong_digit_is_no_account(iban: str, data: st.DataObject) -> None:
    assert check_digits.mod97(iban)
    at = data.draw(st.integers(4, len(iban) - 1).filter(lambda i: iban[i].isdigit()))
    other = data.draw(st.sampled_from([d for d in "0123456789" if d != iban[at]]))
    assert not check_digits.mod97(iban[:at] + other + iban[at + 1 :])


@given(st.ip_addresses(v=4))
def test_ipv4_is_found_as_the_standard_library_reads_it(address: ipaddress.IPv4Address) -> None:
    found = hits(f"host {address} is down", ("ip",))
    first = int(str(address).split(".")[0])
    assert bool(found) == (first not in (0, 127, 255) and (first < 224 or first == 239))


@given(st.text(max_size=60).map(lambda text: text * 40))
@settings(max_examples=60, deadline=None)
def test_no_text_is_slow_or_crashes(text: str) -> None:
    assert isinstance(hits(text, tuple(FINDERS)), list)


@pytest.mark.parametrize(
    "piece", ["1 ", "a.", "1-", "(1", "a@a.", "eyJa.", "::", "1:", "x ", "-----BEGIN PRIVATE KEY-----\n"]
)
def test_repetition_ends(piece: str) -> None:
    assert isinstance(hits(piece * 20_000, tuple(FINDERS)), list)


def test_laws() -> None:
    texts = [row.text for row in rows(FOLDER / "unseen.jsonl")]
    items = [Item(record, "rows") for text in texts[:60] for record in kinds(text, text)]
    for action in ("mask", "drop", "report"):
        check_laws(Pii(action=action), items)
