"""Less common habits of chat templates, each in a small template of its own, with what must train or why it is refused.

`HABITS[name]` is (template, chat, gold): the chat is a key of `CHATS`, gold the trained text turn by turn.
`REFUSED[name]` is (template, chat, reason). `EXTRA[name]` are special tokens that do not look like markup.
"""

from __future__ import annotations

from typing import Any

from data.families import CHATML


def _turns(*turns: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


_CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": _turns("Q1", "One.", "Q2", "Two."),
    "empty": _turns("Q1", "", "Q2", "Two."),
    "think": _turns("Q1", "<think>\nwhy1\n</think>\n\nOne.", "Q2", "<think>\nwhy2\n</think>\n\nTwo."),
    "calls": [
        {"role": "user", "content": "Q1"}, {"role": "assistant", "content": "", "tool_calls": _CALL},
        {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Two."},
    ],
}  # fmt: skip
_ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n"

# the prompt puts the model into a mode by a tag that no row has
MODE_TAG = CHATML.replace(_ASKS, _ASKS + "<judge>\n")
# history without thinking marks, the prompt with an open one
PROMPT_THINKS = CHATML.replace(_ASKS, _ASKS + "<think>\n")
# every answer begins by closing a thought; the prompt opens one
ALWAYS_CLOSED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}</think>{% endif %}{{ m.content | trim }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
# the thought is on a line of its own only where an answer follows
LINE_IF_ANY = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{{ '\\n<think></think>' }}"
    "{% if m.content | trim %}{{ '\\n' + m.content | trim }}{% endif %}{% else %}{{ '\\n' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# history closes a thought that only the last answer opens
CLOSED_IN_HISTORY = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{{ '<think></think>' if loop.last else "
    "'</think>' }}{% endif %}{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>"
    "{% endif %}"
)
# the prompt supplies the closed thought, with other white space than the rows have
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}   "
    "<｜Assistant｜>    </think>  {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <｜Assistant｜></think>{% endif %}"
)
# no add_generation_prompt: the header follows whenever a question comes last; the last answer has no end
WHENEVER_ASKED = (
    "{% for m in messages %}{% if m.role == 'user' %} <|user|> {{ m.content }}{% if loop.last %}  <|bot|> {% endif %}"
    "{% else %} <|bot|>   {{ m.content }}{% if not loop.last %} <|over|>{% endif %}{% endif %}{% endfor %}"
)
# a line of the prompt that rows do not have, between role and answer
DESTINATION = (
    "{{ bos_token }}{% for m in messages %}Source: {{ m.role }}\n\n {{ m.content | trim }} <step> {% endfor %}"
    "{% if add_generation_prompt %}Source: assistant\nDestination: user\n\n {% endif %}"
)
# the prompt ends before the recipient, which the model writes
RECIPIENT = (
    "{% for m in messages %}<|from|>{{ m.role }}\n<|to|>all\n<|content|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|stop|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|from|>assistant\n<|to|>{% endif %}"
)
# control tokens that look like nothing else
BRACKETS = (
    "{% for m in messages %}]~b]{{ 'ai' if m.role == 'assistant' else m.role }}\n{{ m.content }}[e~[\n{% endfor %}"
    "{% if add_generation_prompt %}]~b]ai\n<think>\n{% endif %}"
)
# no roles at all: each turn ends alike
NO_ROLES = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
# reserved tokens as roles, the system prompt before them
RESERVED = (
    "{% for m in messages %}{{ {'user': '<reserved_7>', 'assistant': '<reserved_8>', 'system': ''}[m.role] }}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<reserved_8>{% else %}<reserved_7>{% endif %}"
)
# the whole answer between two tokens of its own, then the end of the turn
ENVELOPE = (
    "{% for m in messages %}<|TURN|><|{{ m.role }}|>{% if m.role == 'assistant' %}<|RESPONSE|>{{ m.content }}"
    "<|RESPONSE_END|>{% else %}{{ m.content }}{% endif %}<|TURN_END|>{% endfor %}"
    "{% if add_generation_prompt %}<|TURN|><|assistant|>{% endif %}"
)
# each text in an envelope, every turn with an end of its own
NESTED = (
    "{% for m in messages %}<|TURN|><|{{ m.role }}|><|TEXT|>{{ m.content }}<|TEXT_END|><|TURN_END|>{% endfor %}"
    "{% if add_generation_prompt %}<|TURN|><|assistant|>{% endif %}"
)
# asks for an answer whether or not it is told to
ALWAYS_ASKS = CHATML.split("{% if add")[0] + "{{ '<|im_start|>assistant\\n' }}"
# eos in the prompt's header, as the token after the role
EOS_OPENS = (
    "{% for m in messages %}{% if m.role == 'user' %}Human: {{ m.content }}\n\nAssistant: {{ eos_token }}{% else %}"
    "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# a date in the system turn, the end of a turn by loop.last, joins by ~, state in a namespace
DATED = (
    "{% set s = namespace(n=0) %}{{ '<|start|>system\\n' ~ strftime_now('%d %b %Y') ~ '<|close|>' }}"
    "{% for m in messages %}{% set s.n = s.n + 1 %}{{ '<|start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|close|>' }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|start|>assistant\\n' }}{% endif %}"
)
# takes a list of parts only, and prints no calls
PARTS_ONLY = CHATML.replace(
    "{{ m.content }}",
    "{% if m.content[0]['type'] == 'text' %}{% endif %}{% for p in m.content %}{{ p['text'] }}{% endfor %}",
)
# an eos at the end of the prompt, where rows have none
EOS_IN_PROMPT = (
    "{% for m in messages %}{{ ' ' + m.content }}{% if not loop.last %}{{ '  ' }}{% endif %}{% endfor %}{{ eos_token }}"
)
# the next role's tag would end the answer, but an empty answer prints no role
DROPS_EMPTY = (
    "{% for m in messages %}{% if m.content %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# an empty answer loses its end
HALF_EMPTY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.content %}{{ '\\n' + m.content }}<|close|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

HABITS: dict[str, tuple[str, str, list[str]]] = {
    "mode tag": (MODE_TAG, "plain", ["One.<|im_end|>", "Two.<|im_end|>"]),
    "mode tag, thoughts": (
        MODE_TAG, "think",
        ["<think>\nwhy1\n</think>\n\nOne.<|im_end|>", "<think>\nwhy2\n</think>\n\nTwo.<|im_end|>"],
    ),
    "prompt thinks": (PROMPT_THINKS, "plain", ["One.<|im_end|>", "Two.<|im_end|>"]),
    "prompt thinks, empty": (PROMPT_THINKS, "empty", ["<|im_end|>", "Two.<|im_end|>"]),
    "always closed": (ALWAYS_CLOSED, "plain", ["</think>One.<|user|>", "</think>Two.<|user|>"]),
    "always closed, empty": (ALWAYS_CLOSED, "empty", ["</think><|user|>", "</think>Two.<|user|>"]),
    "closed in history": (CLOSED_IN_HISTORY, "plain", ["</think>One.<|user|>", "</think>Two.<|user|>"]),
    "closed in history, empty": (CLOSED_IN_HISTORY, "empty", ["</think><|user|>", "</think>Two.<|user|>"]),
    "line if any": (LINE_IF_ANY, "plain", [f"\n<think></think>\n{n}.<|user|>" for n in ("One", "Two")]),
    "line if any, empty": (LINE_IF_ANY, "empty", ["\n<think></think><|user|>", "\n<think></think>\nTwo.<|user|>"]),
    "spaced": (SPACED, "plain", ["  One.<EOS>", "  Two.<EOS>"]),
    "spaced, empty": (SPACED, "empty", ["  <EOS>", "  Two.<EOS>"]),
    "whenever asked": (WHENEVER_ASKED, "plain", ["  One. <|over|>", "  Two. <|over|>"]),
    "destination": (DESTINATION, "plain", ["\n One. <step>", "\n Two. <step>"]),
    "destination, empty": (DESTINATION, "empty", ["\n  <step>", "\n Two. <step>"]),
    "destination, thoughts": (
        DESTINATION, "think",
        ["\n <think>\nwhy1\n</think>\n\nOne. <step>", "\n <think>\nwhy2\n</think>\n\nTwo. <step>"],
    ),
    "recipient": (RECIPIENT, "plain", ["all\n<|content|>One.<|stop|>", "all\n<|content|>Two.<|stop|>"]),
    "brackets": (BRACKETS, "plain", ["One.[e~[", "Two.[e~["]),
    "brackets, empty": (BRACKETS, "empty", ["[e~[", "Two.[e~["]),
    "no roles": (NO_ROLES, "plain", ["One.<EOS>", "Two.<EOS>"]),
    "reserved": (RESERVED, "plain", ["One.<reserved_7>", "Two.<reserved_7>"]),
    "envelope": (
        ENVELOPE, "plain", [f"<|RESPONSE|>{n}.<|RESPONSE_END|><|TURN_END|>" for n in ("One", "Two")],
    ),
    "nested": (NESTED, "plain", [f"<|TEXT|>{n}.<|TEXT_END|><|TURN_END|>" for n in ("One", "Two")]),
    "nested, empty": (NESTED, "empty", ["<|TEXT|><|TEXT_END|><|TURN_END|>", "<|TEXT|>Two.<|TEXT_END|><|TURN_END|>"]),
    "always asks": (ALWAYS_ASKS, "plain", ["One.<|im_end|>", "Two.<|im_end|>"]),
    "eos opens": (EOS_OPENS, "plain", ["One.<EOS>", "Two.<EOS>"]),
    "dated": (DATED, "plain", ["One.<|close|>", "Two.<|close|>"]),
    "dated, empty": (DATED, "empty", ["<|close|>", "Two.<|close|>"]),
}  # fmt: skip
REFUSED: dict[str, tuple[str, str, str]] = {
    "eos in the prompt": (EOS_IN_PROMPT, "plain", "has <EOS>, which the row has not"),
    "an empty answer that is not printed": (DROPS_EMPTY, "empty", "its place in the rendered conversation"),
    "an empty answer without an end": (HALF_EMPTY, "empty", "message 1 is empty, and its place"),
    "parts only, calls dropped": (PARTS_ONLY, "calls", "drops a tool call's name in message 1 (assistant)"),
}
EXTRA = {"brackets": ("]~b]", "[e~["), "brackets, empty": ("]~b]", "[e~[")}
