"""The mask of families, policies, tool calls and refusals, against text written by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data.families import GOLD, SOURCE, STRINGS, TEMPLATES, chat, template, tokenizer_for, trained
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat
from luthier.data.mask import Masker
from luthier.data.policy import MaskPolicy, message_weights
from luthier.data.template import Template

CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "city": "Oslo"}}}]


def masker(name: str, **policy: object) -> Masker:
    made = template(name)
    return Masker(made, tokenizer_for(made), MaskPolicy(**policy))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_trained_text_is_the_gold(name: str) -> None:
    made = masker(name)
    masked = made.mask(chat("Hi", "One.", "More?", "Two."))
    assert trained(masked) == GOLD[name]
    assert made.tokenizer.decode(masked.encoded.ids_T.tolist()) == masked.text
    last = np.flatnonzero(masked.weights_T)[-1]
    assert int(masked.encoded.ids_T[last]) in made.stop_ids


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_prompt_of_inference_begins_the_training_row(name: str) -> None:
    made = masker(name)
    row = chat("Hi", "One.", "More?", "Two.")
    masked = made.mask(row)
    asked = replace(row, messages=row.messages[:3])
    form, found = made.trace(asked, prompt=True)
    fed = made.encode(found.text, found, form)[0].ids_T
    first = int(np.flatnonzero(masked.weights_T)[-len(_last_run(masked.weights_T))])
    shared = min(first, len(fed))
    assert np.array_equal(masked.encoded.ids_T[:shared], fed[:shared])
    if name not in ("deepseek",):  # its prompt adds <think>, which its rows never have
        assert first == len(fed)


def _last_run(weights: np.ndarray) -> list[int]:
    run: list[int] = []
    for i in np.flatnonzero(weights)[::-1]:
        if run and run[-1] != i + 1:
            break
        run.append(int(i))
    return run


@pytest.mark.parametrize(
    ("name", "gold"),
    [
        ("qwen3", ["ans1<|im_end|>", "<think>\nwhy2\n</think>\n\nans2<|im_end|>"]),
        ("qwen3_prompted", ["ans1<|im_end|>", "why2\n</think>\n\nans2<|im_end|>"]),
        ("chatml", [f"<think>\nwhy{i}\n</think>\n\nans{i}<|im_end|>" for i in (1, 2)]),
        ("deepseek", ["\n\nans1<EOS>", "\n\nans2<EOS>"]),
    ],
)
def test_reasoning_as_the_template_has_it(name: str, gold: list[str]) -> None:
    answers = [f"<think>\nwhy{i}\n</think>\n\nans{i}" for i in (1, 2)]
    masked = masker(name).mask(chat("Q1", answers[0], "Q2", answers[1]))
    assert trained(masked) == gold
    assert masked.unshown_reasoning == sum("why" not in text for text in gold)


def test_keep_all_needs_a_template_that_keeps() -> None:
    row = chat("Q1", "<think>\nw\n</think>\n\na", "Q2", "<think>\nx\n</think>\n\nb")
    with pytest.raises(DataError, match=r"leaves out the reasoning .*thinking: split"):
        masker("qwen3", thinking="keep_all").mask(row)
    keeping = TEMPLATES["qwen3"].replace("loop.index0 > ns.last", "loop.index0 > ns.last or preserve_thinking")
    made = Template(keeping, STRINGS, "keeping")
    kept = Masker(made, tokenizer_for(made), MaskPolicy(thinking="keep_all")).mask(row)
    assert trained(kept) == ["<think>\nw\n</think>\n\na<|im_end|>", "<think>\nx\n</think>\n\nb<|im_end|>"]


def test_generation_prompt_trains_when_asked() -> None:
    row = chat("Q1", "a", "Q2", "b")
    assert trained(masker("qwen3_prompted", train_generation_prompt=True).mask(row)) == [
        "a<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>",
    ]  # fmt: skip
    assert trained(masker("chatml", train_generation_prompt=True).mask(row)) == ["a<|im_end|>", "b<|im_end|>"]


def test_roles_weights_and_last_turn() -> None:
    row = chat("Q1", "a", "Q2", "b")
    assert trained(masker("chatml", last_turn_only=True).mask(row)) == ["b<|im_end|>"]
    both = masker("chatml", roles=("user", "assistant")).mask(row)
    assert trained(both) == ["Q1<|im_end|>", "a<|im_end|>", "Q2<|im_end|>", "b<|im_end|>"]
    own = masker("chatml").mask(replace(row, weights=[None, 0.0, None, 0.5]))
    assert trained(own) == ["b<|im_end|>"] and set(own.weights_T) == {0.0, 0.5}
    assert message_weights(replace(row, weights=[1.0, None, None, 0.0]), MaskPolicy()) == [1.0, 1.0, 0.0, 0.0]


def test_tool_calls_train_where_they_are_printed() -> None:
    messages = [
        {"role": "user", "content": "Q"}, {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "tool", "content": "TOOLRES"}, {"role": "assistant", "content": "done"},
    ]  # fmt: skip
    masked = masker("tools").mask(Chat(messages, SOURCE))
    gold = '<tool_call>{"name": "add", "arguments": {"a": 2, "city": "Oslo"}}</tool_call><|im_end|>'
    assert trained(masked) == [gold, "done<|im_end|>"]
    with pytest.raises(
        DataError, match=r"drops a tool call's name in message 1 \(assistant\).*rows.jsonl:7 \(chatml\)"
    ):
        masker("chatml").mask(Chat(messages, SOURCE))


def test_arguments_as_text_where_the_template_wants_text() -> None:
    wants_text = TEMPLATES["tools"].replace(
        "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}",
        "{{ c.function.name + '|' + c.function.arguments }}",
    )
    made = Template(wants_text, STRINGS, "text arguments")
    row = Chat([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": CALL}], SOURCE)
    masked = Masker(made, tokenizer_for(made)).mask(row)
    assert trained(masked) == ['<tool_call>add|{"a": 2, "city": "Oslo"}</tool_call><|im_end|>']


def test_list_content_where_the_template_wants_parts() -> None:
    parts = TEMPLATES["chatml"].replace("{{ m.content }}", "{% for p in m.content %}{{ p['text'] }}{% endfor %}")
    made = Template(parts, STRINGS, "parts")
    assert trained(Masker(made, tokenizer_for(made)).mask(chat("Hi", "One."))) == ["One.<|im_end|>"]


REFUSED = {
    "drops the content of message 0 (system)": (
        TEMPLATES["mistral"],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
    ),
    "System role not supported": (
        TEMPLATES["gemma"],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
    ),
    "no stop token follows": (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}",
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
    ),
    "no generation prompt": (
        TEMPLATES["vicuna"].split("{% if add_generation_prompt")[0],
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
    ),
    "the turn header <|im_start|> before message 1 would be trained": (
        TEMPLATES["chatml"].split("{% if add_generation_prompt")[0],
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
    ),
    "more than once": (
        TEMPLATES["chatml"].replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"),
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
    ),
    "marking the content changes the text": (
        TEMPLATES["chatml"].replace("{{ m.content }}", "{{ m.content | length }}{{ m.content }}"),
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
    ),
    "drops the content of message 1 (assistant)": (
        TEMPLATES["chatml"].replace("{{ m.content }}", "{{ m.content if loop.index0 != 1 else '' }}"),
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
    ),
    "unknown role": (TEMPLATES["chatml"], [{"role": "bot", "content": "a"}]),
    "does not end with a stop token": (
        TEMPLATES["marked"].replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", sorted(REFUSED))
def test_refused_by_name_with_the_reason(reason: str) -> None:
    text, messages = REFUSED[reason]
    made = Template(text, STRINGS, "the-template")
    with pytest.raises(DataError) as caught:
        Masker(made, tokenizer_for(made)).mask(Chat(messages, SOURCE))
    line = caught.value.line()
    assert reason in line and "rows.jsonl:7" in line and "\n" not in line
    assert reason == "unknown role" or "the-template" in line


def test_empty_answer_trains_its_stop_token_only() -> None:
    assert trained(masker("chatml").mask(chat("Q", "", "Q2", "b"))) == ["<|im_end|>", "b<|im_end|>"]
    assert trained(masker("marked").mask(chat("Q", "", "Q2", "b"))) == ["<|im_end|>", "b<|im_end|>"]


def test_white_space_around_an_answer() -> None:
    padded = chat("Q", "  padded \n", "Q2", "\n\n last ")
    assert trained(masker("chatml").mask(padded)) == ["  padded \n<|im_end|>", "\n\n last <|im_end|>"]
    assert trained(masker("llama3").mask(padded)) == ["padded<|eot_id|>", "last<|eot_id|>"]


def test_content_that_looks_like_markup_of_the_template() -> None:
    answer = "see <tool_response>x</tool_response> and </think> here"
    assert trained(masker("chatml").mask(chat("<tool_response>\nres\n</tool_response>", answer))) == [
        f"{answer}<|im_end|>"
    ]
