"""What the gate is given of a run: its first rows, and what inference will feed beside what was trained.

Roles and prompts are looked at on the first few conversations of the rows (of a pair, its chosen side), by the same
template, tokenizer and mask that training uses; the checks themselves are the engine's (engine/gate.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.assembly import Assembled
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat
from luthier.data.encode import Encoder
from luthier.data.mask import Masked
from luthier.data.pairs import first_text
from luthier.data.policy import MaskPolicy
from luthier.data.template import MARKUP
from luthier.engine.gate_rows import differs_at
from luthier.engine.gate_spec import GateSpec, Prompt

_PROMPTS = 32


def gate_of(work: Assembled) -> GateSpec:
    """What the gate checks: the first real batches, and the prompts of inference against those of training."""
    ledger, facts = work.prepared.ledger, work.trunk.facts
    texts = map(first_text, work.prepared.train_records[:_PROMPTS])  # of a pair its chosen side
    chats = [text for text in texts if isinstance(text, Chat)]
    seen = [(chat, work.encoder.masked(chat)) for chat in chats]
    return GateSpec(
        scorer=work.scorer, stream=work.stream, stop_ids=work.encoder.stop_ids,
        bos_id=work.loaded.tokenizer.bos_token_id, prompts=_prompts(work.encoder, seen),
        roles=_roles(work.encoder.policy, seen), rows_read=ledger.total("read"), dropped=ledger.reasons,
        facts={"path": facts.path, "reason": facts.reason, "kernel": facts.kernel, "evidence": facts.evidence},
    )  # fmt: skip


def _roles(policy: MaskPolicy, seen: Sequence[tuple[Chat, Masked]]) -> dict[str, int]:
    """Trained tokens of each role that the recipe asks for and the rows have; 0 is what the gate looks for."""
    asked = [] if policy.last_turn_only else policy.roles
    there = {message["role"] for chat, _ in seen for message in chat.messages}
    counts = {role: 0 for role in asked if role in there}
    for chat, masked in seen:
        for turn in masked.turns:
            role = chat.messages[turn.message]["role"]
            trained = masked.weights_T[masked.encoded.inside(turn.start, turn.end)]
            counts[role] = counts.get(role, 0) + int((trained > 0).sum())
    return counts


def _prompts(encoder: Encoder, seen: Sequence[tuple[Chat, Masked]]) -> list[Prompt]:
    """The last question of each conversation as inference would feed it, beside the ids that train."""
    found = []
    for chat, masked in seen:
        if len(chat.messages) > 1 and chat.messages[-1]["role"] == "assistant":
            inference, trained = encoder.prompt_ids(chat.messages[:-1], chat.tools), masked.encoded.ids_T.tolist()
            found.append(Prompt(str(chat.source), inference, trained, _beyond(encoder, chat, inference, trained)))
    return found


def _beyond(encoder: Encoder, chat: Chat, inference: Sequence[int], trained: Sequence[int]) -> str | None:
    """What the generation prompt adds after its role header and the row has not, where it is tags only (`<think>`).

    The two must agree on the whole conversation before and on the beginning of what the prompt adds to it.
    """
    at = differs_at(inference, trained)
    if at is None:
        return None
    try:
        before = encoder.prompt_ids(chat.messages[:-1], chat.tools, generation=False)
    except DataError:  # a template that does not render a conversation ending with a question
        return None
    added: str = encoder.tokenizer.decode(list(inference[at:]))
    return added if len(before) < at and not MARKUP.sub("", added).strip() else None
