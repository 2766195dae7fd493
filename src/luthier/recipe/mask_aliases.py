"""What other trainers say about which tokens train: settings that are met here for one value and refused for others.

    train_on_eos, train_on_eot   Axolotl: turn (met) | last | all | none
    eot_tokens, efficient_eos    where a turn ends is read from the chat template by rendering it
    split_thinking               Axolotl: reasoning inside the content is found either way
    completion_only_loss         TRL: true (met); loss_scale of ms-swift names roles

The names that are only other words for ours (`train_on_inputs`, `roles_to_train`, `mask_history`,
`assistant_only_loss`) are in aliases.py. Leaves out: spans inside a message (Axolotl's `train_detail`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ALL_ROLES = ["system", "user", "assistant"]


@dataclass(frozen=True)
class Settled:
    """A setting that is met for the values of `met` (why: `note`); any other value is refused with its remedy."""

    met: tuple[Any, ...]
    note: str
    remedies: dict[Any, str]  # value -> what to do; None: for all others

    def remedy(self, value: Any) -> str:
        key = value if isinstance(value, str | bool) else None
        return self.remedies.get(key, self.remedies.get(None, ""))


_STOP = Settled(
    ("turn",),
    "every trained answer trains with its stop token, and no other turn's",
    {
        "last": "data.mask.last_turn_only: true trains the last answer with its stop token; an answer that trains "
        "without one teaches a model not to stop",
        "all": "the end of a turn trains with its words: data.mask.roles: [user, assistant] trains both sides",
        None: "an answer that trains without its stop token teaches a model not to stop; leave it out",
    },
)
_ENDS = "the tokens that end an answer are read from the chat template by rendering it"
SETTLED: dict[str, Settled] = {
    "train_on_eos": _STOP,
    "train_on_eot": _STOP,
    "eot_tokens": Settled((), _ENDS, {}),
    "efficient_eos": Settled((), _ENDS, {}),
    "split_thinking": Settled((), "reasoning inside <think> of a content is found either way", {}),
    "template": Settled(
        (),
        "the chat template of the tokenizer is used, whatever the family's name; model.chat_template gives another",
        {},
    ),
    "completion_only_loss": Settled(
        (True, None),
        "rows of prompt and completion train the completion",
        {None: "rows of plain text train whole; rows of prompt and completion train the completion"},
    ),
    "enable_thinking": Settled(
        (None,), "the chat template decides",
        {None: "the chat template decides: write model.template_variables: {enable_thinking: …} if it reads that"},
    ),
    "default_system_message": Settled(
        (None,), "it asks for nothing", {None: "write it into the rows as a system turn, so that inference gets it too"}
    ),
}  # fmt: skip


def roles(value: Any) -> Any:
    """Axolotl's and LLaMA-Factory's words for the roles that train."""
    if isinstance(value, bool):
        return ALL_ROLES if value else ["assistant"]
    names = {"gpt": "assistant", "model": "assistant", "human": "user"}
    listed = value if isinstance(value, list) else [value]
    return [names.get(name, name) if isinstance(name, str) else name for name in listed]


def only_answers(value: Any) -> Any:
    """TRL's assistant_only_loss: answers, or every word of a conversation."""
    return {True: ["assistant"], False: ALL_ROLES}[value] if isinstance(value, bool) else value


def loss_scale(value: Any) -> Any:
    """ms-swift's loss_scale, where it names roles."""
    known = {"default": ["assistant"], "all": ALL_ROLES}
    if isinstance(value, str) and value in known:
        return known[value]
    if value == "last_round":
        raise ValueError("data.mask.last_turn_only: true does this")
    raise ValueError("a loss weight stands in the row: {role: assistant, content: …, weight: 0.5}")


def template(value: Any) -> Any:
    """Axolotl's `tokenizer_default` is what happens without a word."""
    return None if isinstance(value, str) and value.startswith("tokenizer_default") else value
