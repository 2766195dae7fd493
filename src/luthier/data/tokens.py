"""Control strings of a chat template: what must be one token of the tokenizer.

A chat template writes turns with strings such as `<|im_start|>`. If the tokenizer does not know such a string as
one added token, it falls into pieces, the model never sees a turn boundary, and text in a row can forge one. Rule:

    must be one token    `<|...|>`, `<｜...｜>` and `[|...|]` always; `<...>` where it names a turn or a sequence
                         (`<start_of_turn>`, `<end_of_utterance>`, `<seed:bos>`, `<s>`, `</s>`)
    may be plain text    `[INST]`, `[/INST]` (Llama-2 and Mistral v1 write them so), `### Instruction:`, `USER:`,
                         `<think>`, `<tool_call>`, `<tools>` and other tags of content

What a template really prints counts, not what it mentions: strings of a branch that no conversation reaches are not
asked for here. A row that reaches one is checked again when it is masked (`missing_tokens`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from luthier.contracts.errors import DataError
from luthier.data.template import MARKUP, Template

_SEQUENCE_TAG = re.compile(r"</?(s|bos|eos|sop|eop)>|</?[\w.\-]*(_of_|turn)[\w.\-]*>|<[\w.\-]*:(bos|eos)>")


def must_be_atomic(text: str) -> bool:
    """Whether a piece of markup is of a form that only works as one token."""
    return text.startswith(("<|", "<｜", "[|")) or text.endswith("|>") or bool(_SEQUENCE_TAG.fullmatch(text))


def missing_tokens(texts: Iterable[str], tokenizer: Any, known: Collection[str] | None = None) -> list[str]:
    """Control strings in the texts that must be single tokens of the tokenizer and are not, in order of appearance.

    `known`: the added tokens, where the caller has them at hand.
    """
    if known is None:
        known = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    found: dict[str, None] = {}
    for text in texts:
        for candidate in MARKUP.findall(text):
            if candidate not in known and must_be_atomic(candidate):
                found[candidate] = None
    return list(found)


def check_atomic(template: Template, tokenizer: Any) -> None:
    """DataError naming every control string that the template prints and the tokenizer does not know as one token."""
    missing = missing_tokens(template.probes(), tokenizer)
    if missing:
        raise not_atomic(missing, template.name)


def not_atomic(missing: Sequence[str], where: str) -> DataError:
    """The error for control strings that are not single tokens; it says which line of the recipe adds them."""
    return DataError(
        "control strings of the chat template are not single tokens of the tokenizer", where=where,
        value=", ".join(missing), remedy=f"model.add_tokens: {json.dumps(list(missing), ensure_ascii=False)}",
    )  # fmt: skip
