"""Chat templates grown from parts, with the trained text known by construction, and random changes to written ones.

`grow(random)` gives a template whose every piece was chosen here: header, separator, stop, what the prompt adds, how
the text is joined. The gold comes from the same pieces by plain string work, and shares no code with the masker.
`mutate(random, text)` changes a template at random places: what then trains is not known, only what must hold anyway.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Turn = tuple[str, str]  # question, answer
_OPEN = ("<|im_start|>", "<|turn|>", "<start_of_turn>", "[|", "<｜", "", "<role>")
_ROLES = (("user", "assistant"), ("user", "model"), ("human", "bot"), ("USER", "ASSISTANT"), ("Human", "Assistant"))
_AFTER = ("\n", "", "\n\n", ": ", "<|sep|>", "\n<|content|>")
_STOPS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "EOS",
    "<|close|>",
    "\n<|EOT|>",
    "<|text_end|><|turn_end|>",
    " EOS",
)
_BETWEEN = ("\n", "", "\n\n", " ")
_TAGS = ("", "<think>\n", "<judge>\n", "<think>\n\n</think>\n\n")


@dataclass(frozen=True)
class Grown:
    """A template, and what it must train of a conversation."""

    text: str
    trains: Callable[[Sequence[Turn]], list[str]]
    plain: bool  # of the habits that must be proven, not refused


def grow(rng: random.Random) -> Grown:
    user, bot = (_header(rng_state, role) for rng_state, role in _shared_header(rng))
    stop, between = rng.choice(_STOPS), rng.choice(_BETWEEN)
    closed_users = rng.random() < 0.7
    trims = rng.random() < 0.3
    lead = rng.choice(("", "", "", " ", "<|channel|>final<|message|>"))  # the model writes it
    tag = rng.choice(_TAGS) if not lead else ""
    last = rng.choice(("same", "same", "same", "other", "absent", "eos"))
    visible = stop.replace("EOS", "<EOS>")
    ends = {"same": visible, "other": "<|return|>", "absent": "", "eos": visible}[last]
    asks = rng.choice(("asked", "asked", "asked", "asked", "never", "always"))
    text = _write(rng, user, bot + lead, stop, closed_users, between, trims, last, bot + tag, asks)

    def trains(turns: Sequence[Turn]) -> list[str]:
        made = []
        for k, (_, answer) in enumerate(turns):
            end = visible if k < len(turns) - 1 or last == "absent" else ends
            made.append(lead + (answer.strip() if trims else answer) + end)
        return made

    plain = asks == "asked" and last in ("same", "eos") and bot.startswith(("<", "[")) and closed_users
    return Grown(text, trains, plain)


def _shared_header(rng: random.Random) -> list[tuple[tuple[str, str], str]]:
    opener, after = rng.choice(_OPEN), rng.choice(_AFTER)
    users, bots = rng.choice(_ROLES)
    return [((opener, after), users), ((opener, after), bots)]


def _header(parts: tuple[str, str], role: str) -> str:
    opener, after = parts
    closing = {"[|": "|]", "<｜": "｜>", "<role>": "</role>"}.get(opener, "")
    return f"{opener}{role}{closing}{after}" if opener or after.strip() else f"{role}:{after or ' '}"


def _write(
    rng: random.Random, user: str, bot: str, stop: str, closed: bool, between: str, trims: bool, last: str,
    asked: str, asks: str,
) -> str:  # fmt: skip
    """The template's text: one of several ways to write the same thing."""
    join = rng.choice((" + ", " ~ "))
    content = rng.choice(("m.content", "m['content']")) + (" | trim" if trims else "")
    end = _expression(stop, join)
    if last == "other":
        end = f"('<|return|>' if {_LAST} else {end})"
    elif last == "absent":
        end = f"('' if {_LAST} else {end})"
    spoken = f"{_expression(bot, join)}{join}({content}){join}{end}"
    question = f"{_expression(user, join)}{join}({content})" + (f"{join}{_expression(stop, join)}" if closed else "")
    gap = f"{{{{ {between!r} }}}}" if between and rng.random() < 0.5 else between
    if last != "same" or gap.strip(" {}'\\n") or not gap.endswith("\n"):
        gap = f"{{% if not {_LAST} %}}{{{{ {between!r} }}}}{{% endif %}}" if between else ""
    start = rng.choice(("", "{{ bos_token }}", "{{ strftime_now('%d %b %Y') }}\n", "{% set ns = namespace(n=0) %}"))
    count = "{% set ns.n = ns.n + 1 %}" if "namespace" in start else ""
    body = f"{{% if m.role == 'user' %}}{{{{ {question} }}}}{{% else %}}{{{{ {spoken} }}}}{{% endif %}}{count}{gap}"
    loop = "{% for m in messages %}" + body + "{% endfor %}"
    if rng.random() < 0.3:
        loop = "{% for i in range(messages | length) %}{% set m = messages[i] %}" + body + "{% endfor %}"
    before = between if last != "same" or not gap.endswith("\n") else ""
    opening = f"{{{{ {before!r}{join}{_expression(asked, join)} }}}}"
    trail = "{{ eos_token }}" if last == "eos" else ""
    if asks == "never":
        return start + loop + trail
    if asks == "always":
        return start + loop + opening
    ask = f"{{% if add_generation_prompt %}}{opening}{{% else %}}{trail}{{% endif %}}"
    return start + loop + ask


_LAST = "loop.last"


def _expression(text: str, join: str) -> str:
    return join.join("eos_token" if part == "EOS" else repr(part) for part in _split(text)) or "''"


def _split(text: str) -> list[str]:
    head, found, tail = text.partition("EOS")
    return [part for part in (head, found, tail) if part]


_BITS = (
    "<think>", "</think>", "{{ eos_token }}", "{{ bos_token }}", " ", "\n", "{% if loop.last %}", "{% endif %}",
    "| trim", "{{ m.content }}", "{{ m.role }}", "<|im_end|>", "<|im_start|>assistant\n", "{% if not loop.last %}",
    " ~ ", "assistant", "{{ strftime_now('%Y') }}", "not ", "{{ messages | length }}", "{{ m }}", "{% break %}",
    "| upper", "{{ raise_exception('no') }}", "{% generation %}", "{% endgeneration %}", "[::-1]", "{{ tools }}",
    "{% set messages = messages[1:] %}", "\U000f0002", "\x00",
)  # fmt: skip


def mutate(rng: random.Random, text: str) -> str:
    """One or two cuts, copies, insertions or moves, at a border of code as a rule."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        borders = [k + 2 * (text[k] == "}") for k in range(len(text)) if text[k : k + 2] in ("{{", "{%", "}}", "%}")]
        at = rng.choice([0, len(text), *borders]) if rng.random() < 0.7 else rng.randrange(len(text))
        end = min(len(text), at + rng.randint(1, 24))
        to = rng.randrange(len(text))
        changed = (
            text[:at] + text[end:],
            text[:at] + text[at:end] + text[at:],
            text[:at] + rng.choice(_BITS) + text[at:],
            text[:to] + text[at:end] + text[to:],
        )
        text = rng.choice(changed) or "x"
    return text
