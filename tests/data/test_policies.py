"""What the recipe says of a mask, from a conversation to its samples, on real templates of five thinking families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from data.families import SOURCE, STRINGS, TEMPLATES, chat, tokenizer_for, trained
from data.gold_reading import CHATS, TOOL, tools_of
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat
from luthier.data.encode import Encoder
from luthier.data.show import remarks, shown
from luthier.data.template import Template

QWEN3, GLM, GPT_OSS = "trl__qwen3", "llamacpp__GLM-4.6", "trl__gptoss"
DEEPSEEK, NEMOTRON = "trl__deepseekv3", "trl__nemotron_3_nano"
FAMILIES = (QWEN3, GLM, GPT_OSS, DEEPSEEK, NEMOTRON)


@dataclass
class Mask:
    roles: tuple[str, ...] = ("assistant",)
    last_turn_only: bool = False
    thinking: str = "as_template"
    train_generation_prompt: bool = False


@dataclass
class Section:
    mask: Mask
    max_tokens: int = 4096
    overlong: str = "drop"
    injection: str = "escape"


Make = Callable[..., Encoder]


@pytest.fixture
def make(shared_data: Callable[[str], Path]) -> Make:
    """An encoder of a real template, by name and mask fields."""

    def made(stem: str, **mask: Any) -> Encoder:
        path = shared_data("chat_templates") / f"{stem}.jinja"
        if not path.is_file():
            pytest.skip(f"no template {path.name} beside the checkout")
        template = Template(path.read_text(encoding="utf-8"), STRINGS, stem)
        return Encoder(tokenizer_for(template), template, Section(Mask(**mask)))

    return made


def _trained(encoder: Encoder, row: Chat) -> list[list[str]]:
    """Sample by sample, the runs of trained tokens as text."""
    found = []
    for sample in encoder.samples(row):
        (piece,) = sample.pieces
        runs: list[list[int]] = [[]]
        for token, weight in zip(piece.tokens, piece.weights, strict=True):
            if weight:
                runs[-1].append(int(token))
            elif runs[-1]:
                runs.append([])
        found.append([encoder.tokenizer.decode(run) for run in runs if run])
    return found


def _row(name: str) -> Chat:
    return Chat(CHATS[name], SOURCE, tools_of(name))


SPLIT = {
    QWEN3: ["<think>\nWhy {n}\n</think>\n\nSay {n}.<|im_end|>"] * 2,
    GLM: ["\n<think>Why {n}</think>\nSay {n}.<|user|>"] * 2,
    GPT_OSS: [
        "<|channel|>analysis<|message|>Why {n}<|end|><|start|>assistant<|channel|>final<|message|>Say {n}.<|return|>"
    ] * 2,
    NEMOTRON: ["Why {n}\n</think>\nSay {n}.<|im_end|>"] * 2,
    DEEPSEEK: ["Say {n}.<｜end▁of▁sentence｜>"] * 2,
}  # fmt: skip


@pytest.mark.parametrize("stem", FAMILIES)
def test_split_trains_each_answer_as_the_last_one(stem: str, make: Make) -> None:
    encoder, row = make(stem, thinking="split"), _row("reasoning")
    gold = [[text.format(n=word)] for text, word in zip(SPLIT[stem], ("one", "two"), strict=True)]
    assert _trained(encoder, row) == gold
    for index, sample in zip((1, 3), encoder.samples(row), strict=True):  # the row begins as inference will
        fed = encoder.prompt_ids(row.messages[:index])
        tokens = [int(token) for token in sample.pieces[0].tokens]
        shared = len(fed) if stem != DEEPSEEK else len(fed) - len(encoder.tokenizer("<think>\n")["input_ids"])
        assert tokens[:shared] == fed[:shared]
    notes = " ".join(encoder.notes())
    assert ("into the content" in notes) == bool(notes) == (stem == DEEPSEEK), "it prints no reasoning anywhere"


LOST = {QWEN3: 1, GLM: 1, GPT_OSS: 1, NEMOTRON: 1, DEEPSEEK: 2}  # answers of two whose reasoning is left out


@pytest.mark.parametrize("stem", FAMILIES)
def test_reasoning_that_the_template_leaves_out_is_counted_and_told(stem: str, make: Make) -> None:
    encoder = make(stem)
    for _ in range(3):
        encoder.samples(_row("reasoning"))
        (change,) = encoder.changes.values()
        assert change.amount == LOST[stem] and change.of == "answers"
    (note,) = encoder.notes()
    assert f"reasoning of {3 * LOST[stem]} of 6 trained answers" in note and "thinking: split" in note
    assert ("where this template keeps it" in note) == (stem != DEEPSEEK)
    said = remarks(encoder, _row("reasoning"))["remarks"]
    assert len(said) == LOST[stem] and "reasoning of message 1 is not in the text" in said[0]
    assert remarks(encoder, _row("turns")) == {}
    only = make(stem, last_turn_only=True)
    only.samples(_row("reasoning"))
    assert bool(only.notes()) == (stem == DEEPSEEK), "what does not train is not lost"


def test_keep_all_sets_the_switch_of_the_family_for_rows_and_for_inference(make: Make) -> None:
    encoder, row = make(NEMOTRON, thinking="keep_all"), _row("reasoning")
    assert _trained(encoder, row) == [[f"Why {n}\n</think>\nSay {n}.<|im_end|>" for n in ("one", "two")]]
    (sample,) = encoder.samples(row)
    fed = encoder.prompt_ids(row.messages[:3])
    assert [int(token) for token in sample.pieces[0].tokens][: len(fed)] == fed
    assert "Why one" in encoder.tokenizer.decode(fed)
    assert any("truncate_history_thinking: False" in note for note in encoder.notes())


@pytest.mark.parametrize("stem", [QWEN3, GLM, GPT_OSS, DEEPSEEK])
def test_keep_all_is_refused_where_no_switch_keeps(stem: str, make: Make) -> None:
    encoder = make(stem, thinking="keep_all")
    with pytest.raises(DataError, match="leaves out the reasoning of message 1, which keep_all asks for") as caught:
        encoder.samples(_row("reasoning"))
    assert ("into the content" in str(caught.value.remedy)) == (stem == DEEPSEEK)
    assert encoder.samples(_row("turns"))


@pytest.mark.parametrize(
    ("stem", "gold"),
    [
        (NEMOTRON, ["<think></think>Say one.<|im_end|>", "<think></think>Say two.<|im_end|>"]),
        (QWEN3, ["Say one.<|im_end|>", "<think>\n\n</think>\n\nSay two.<|im_end|>"]),
        (GPT_OSS, ["<|channel|>final<|message|>Say one.<|end|>", "<|channel|>final<|message|>Say two.<|return|>"]),
    ],
)
def test_what_the_prompt_supplies_behind_the_header_trains_on_request(stem: str, gold: list[str], make: Make) -> None:
    assert _trained(make(stem, train_generation_prompt=True), _row("system")) == [gold]


@pytest.mark.parametrize("stem", FAMILIES)
def test_a_tools_result_trains_only_where_its_role_is_asked_for(stem: str, make: Make) -> None:
    (plain,) = _trained(make(stem), _row("tools"))
    assert len(plain) == 2 and "warmth" in plain[0] and "Oslo" in plain[0]
    assert not any("RESULT4" in text or "How warm?" in text for text in plain)
    asked = "".join(_trained(make(stem, roles=("assistant", "tool")), _row("tools"))[0])
    assert asked.count("RESULT4") == 1 and "How warm?" not in asked
    assert all(text in asked for text in plain)


def test_roles_beside_markers() -> None:
    template = Template(TEMPLATES["marked"], STRINGS, "marked")
    encoder = Encoder(tokenizer_for(template), template, Section(Mask(roles=("user", "assistant"))))
    assert _trained(encoder, chat("Q1", "a", "Q2", "b")) == [
        ["Q1<|im_end|>", "a<|im_end|>", "Q2<|im_end|>", "b<|im_end|>"]
    ]


@pytest.mark.parametrize("stem", FAMILIES)
def test_weights_of_a_row_and_the_last_turn(stem: str, make: Make) -> None:
    row = _row("turns")
    encoder = make(stem, last_turn_only=True)
    (only,) = _trained(encoder, row)
    assert len(only) == 1 and "Say three." in only[0]
    weighted = replace(row, weights=(None, 0.25, None, 0.0, 1.0, None))
    (sample,) = make(stem).samples(weighted)
    values = [float(weight) for weight in sample.pieces[0].weights]
    assert set(values) == {0.0, 0.25, 1.0}
    (texts,) = _trained(make(stem), weighted)
    assert [word in "".join(texts) for word in ("Say one.", "Say two.", "Say three.", "Ask three", "Ask one")] == [
        True, False, True, True, False,
    ]  # fmt: skip
    seen = shown(sample, encoder.tokenizer)
    assert seen["weights"] == values and "weights" not in shown(make(stem).samples(row)[0], encoder.tokenizer)


@pytest.mark.parametrize("stem", FAMILIES)
def test_two_calls_at_once_with_words_and_reasoning_before_them(stem: str, make: Make) -> None:
    calls = [
        {"type": "function", "id": f"call0000{i}", "function": {"name": "warmth", "arguments": {"city": city}}}
        for i, city in enumerate(("Oslo", "Bergen"))
    ]
    results = [
        {"role": "tool", "name": "warmth", "tool_call_id": f"call0000{i}", "content": f"RESULT{i}"} for i in range(2)
    ]
    asked = {"role": "user", "content": "Which is warmer?"}
    answer = {"role": "assistant", "content": "Bergen is."}
    call = {"role": "assistant", "content": "", "reasoning_content": "Ask both.", "tool_calls": calls}
    row = Chat([asked, call, *results, answer], SOURCE, [TOOL])
    encoder = make(stem)
    if stem == GPT_OSS:
        with pytest.raises(DataError, match=r"drops a tool call's \w+ in message 1 .* prints one call a turn"):
            encoder.samples(row)
        row = Chat([asked, {**call, "tool_calls": calls[:1]}, results[0], call | {"tool_calls": calls[1:]}], SOURCE)
    (texts,) = _trained(encoder, row)
    whole = "".join(texts)
    assert "Oslo" in whole and "Bergen" in whole and whole.count("warmth") == 2
    assert not any(word in whole for word in ("RESULT0", "RESULT1", "warmer"))
    ends = [encoder.vocabulary.control[name] for name in encoder.masker.closers | encoder.masker.call_ends]
    assert all(encoder.tokenizer(text, add_special_tokens=False)["input_ids"][-1] in ends for text in texts)


def test_trained_text_of_a_mask_and_of_its_sample_agree(make: Make) -> None:
    for stem in FAMILIES:
        encoder = make(stem)
        for name in ("turns", "system", "tools"):
            assert _trained(encoder, _row(name)) == [trained(encoder.masked(_row(name)))], (stem, name)
