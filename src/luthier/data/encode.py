"""Records to token pieces: the one place where text becomes ids and weights.

    Chat        template, mask (mask.py); the text carries its own bos, none is added
    Completion  prompt + completion + eos, one text; the completion and the stop token train
    Text        bos (if the tokenizer puts one before raw text) + text + eos; every token but the first trains
    Pair        both texts as above, then one prompt with two leaves (pairs.py); Judged: its answer, and a label
    Segments    and Tokens: masked exactly as given (given.py)

Overlong rows follow `data.overlong` (overlong.py): a shortened row is a slice of the whole row and its mask the same
slice, so no token's weight ever depends on a cut; `truncate_turns` leaves out whole exchanges. A row with no trained
token left is dropped by name. What was done to a row that is kept stands in `changes`, for the ledger.

Texts without a template (Completion, Text) are raw_text.py's. Arrays are numpy: int64 tokens, float32 weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np

from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.record import (
    Chat,
    Completion,
    Judged,
    Pair,
    Piece,
    Prompt,
    Record,
    Sample,
    Segments,
    Source,
    Stepwise,
    Text,
    Tokens,
)
from luthier.data import overlong, pairs
from luthier.data.fields import DataFields
from luthier.data.given import segments_row, tokens_row
from luthier.data.ledger import Change, Dropped
from luthier.data.mask import Masked, Masker
from luthier.data.overlong import split
from luthier.data.overrides import overridden
from luthier.data.policy import MaskPolicy, message_weights
from luthier.data.raw_text import RawText, Row
from luthier.data.template import Template
from luthier.data.tokens import check_atomic
from luthier.data.vocabulary import Vocabulary


class Encoder:
    """Tokenizer, template and policy of one run. `samples` and `pieces` are pure; `escaped` counts as they go."""

    def __init__(
        self, tokenizer: Any, template: Template | None, section: DataFields, stop_ids: Sequence[int] = (), *,
        score_prompt: bool = False,
    ) -> None:  # fmt: skip
        self._made_of = (tokenizer, template, section, tuple(stop_ids))
        template = template and overridden(template)
        self.tokenizer, self.template = tokenizer, template
        self.score_prompt = score_prompt  # of pairs: what the objective asks for
        self.max_tokens, self.overlong = int(section.max_tokens), str(section.overlong)
        self.policy = MaskPolicy(
            tuple(section.mask.roles), section.mask.last_turn_only, section.mask.thinking,
            section.mask.train_generation_prompt, section.injection,
        )  # fmt: skip
        self._given_stops = tuple(stop_ids)
        self._masker: Masker | None = None
        if template is not None:
            check_atomic(template, tokenizer)
            self._masker = Masker(template, tokenizer, self.policy, stop_ids)
            self.template = self._masker.template
        self.vocabulary = self._masker.vocabulary if self._masker else Vocabulary(tokenizer)
        self.raw = RawText(tokenizer, self.vocabulary, refuse_controls=self.policy.injection == "error")
        self.escaped = 0  # control strings of content that were neutralised
        self.changes: dict[str, Change] = {}  # what was done to the row that `samples` was last asked for
        self.reasoned = self.unshown_reasoning = 0  # trained answers with reasoning; those whose text leaves it out

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process as what it was made of; its counts begin anew there."""
        make = partial(Encoder, score_prompt=self.score_prompt)
        return make, self._made_of

    @property
    def masker(self) -> Masker:
        if self._masker is None:
            raise DataError(
                "conversations need a chat template, and the tokenizer has none", where="model.chat_template",
                remedy="give one there, or use prompt/completion or text rows",
            )  # fmt: skip
        return self._masker

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end generation: those given and those that training teaches as stops."""
        learned = self._masker.stop_ids if self._masker is not None else ()
        eos = () if self.vocabulary.eos_id is None else (self.vocabulary.eos_id,)
        return tuple(dict.fromkeys([*self._given_stops, *eos, *learned]))

    def notes(self) -> list[str]:
        """What people should know of the rows encoded so far: the override in force, reasoning that is not trained."""
        said = []
        if self.template is not None and self.template.override:
            said.append(f"chat template {self.template.name} was mended ({self.template.override})")
        if self.template is not None and self.template.variables:
            shown = ", ".join(f"{name}: {value}" for name, value in self.template.variables.items())
            said.append(f"the chat template has {shown}: so do the rows, inference, and the template that is saved")
        if self.unshown_reasoning:
            said.append(
                f"the chat template leaves out the reasoning of {self.unshown_reasoning} of {self.reasoned} trained "
                f"answers that have some: {self._reasoning_remedy()}"
            )
        return said

    def _reasoning_remedy(self) -> str:
        if self.policy.thinking == "as_template" and self.unshown_reasoning < self.reasoned:
            return (
                "data.mask.thinking: split trains each answer as the last one, where this template keeps it; keep_all "
                "asks the template to keep it everywhere"
            )
        split = "try data.mask.thinking: split, " if self.policy.thinking == "as_template" else ""
        return f"{split}write it into the content as <think>…</think>, or name another model.chat_template"

    def samples(self, record: Record) -> list[Sample]:
        """The samples of a record: one, or several for `overlong: split` and `thinking: split`.

        Raises Dropped where a policy drops the row, DataError where the row is wrong.
        """
        self.changes = {}
        if isinstance(record, Pair):
            return [self._pair(record)]
        if isinstance(record, Judged):
            self._refuse_split()
            (answer,) = pairs.sides(record)
            return [pairs.judged_sample(record, sample) for sample in self.samples(answer)]
        if isinstance(record, Prompt | Stepwise):
            raise TypeError(f"{type(record).__name__} is not encoded here: kinds.py refuses it before")
        made: list[Sample] = []
        rows = self._rows(record)
        for tokens_T, weights_T, cuts in rows:
            for start, end in self._slices(record, weights_T, cuts):
                shown = weights_T[start:end].copy()
                shown[:1] = 0.0
                if shown.any():
                    made.append(Sample((_piece(tokens_T[start:end], shown),), record.source))
        self._note_cuts(rows, made)
        if not made:
            was_cut = any(len(row[0]) > self.max_tokens for row in rows)
            raise Dropped("no trained token after truncation" if was_cut else "no trained token")
        return made

    def pieces(self, record: Record) -> tuple[Piece, ...]:
        """The pieces of a record that makes one sample; a record that makes several raises ValueError."""
        made = self.samples(record)
        if len(made) != 1:
            raise ValueError(f"{record.source} makes {len(made)} samples; ask for samples()")
        return made[0].pieces

    def masked(self, chat: Chat) -> Masked:
        """The whole mask of a conversation, before any cut: for showing and for checks."""
        return self.masker.mask(chat)

    def prompt_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, *,
        generation: bool = True,
    ) -> list[int]:  # fmt: skip
        """What inference feeds before an answer to `messages`: the same template, tokenizer and neutralising.

        `generation=False` leaves out what the template adds to ask for the answer.
        """
        chat = Chat(list(messages), Source("prompt", 1), tools)
        form, found = self.masker.trace(chat, prompt=generation)
        encoded, _ = self.masker.encode(found.text, found, form)
        return encoded.ids_T.tolist()

    def raw_prompt_ids(self, prompt: str) -> list[int]:
        """What inference feeds before a completion of `prompt` (no template)."""
        return self.raw.prompt_ids(prompt)

    def _pair(self, record: Pair) -> Sample:
        self._refuse_split()
        sides = self._sides(record)
        longest = _longest(sides)
        if longest > self.max_tokens:
            if self.overlong == "error":
                raise self._too_long(record.source, longest)
            if self.overlong == "truncate_turns":
                shorter = overlong.fewer_turns_of_pair(
                    record, lambda pair: _longest(self._sides(pair)) <= self.max_tokens
                )
                sides = self._sides(shorter) if shorter is not None else sides
        one, other = pairs.fitted(sides[0], sides[1], self.max_tokens, self.overlong)
        sample = pairs.pair_sample(record, one, other, score_prompt=self.score_prompt)
        if longest > self.max_tokens:
            self._note(f"cut by {self.overlong}", longest - _longest([one, other]), "tokens left out")
        return sample

    def _sides(self, record: Pair) -> list[pairs.Side]:
        """Both answers with their prompt, whole."""
        made: list[pairs.Side] = []
        for side in pairs.sides(record):
            rows = self._rows(side, whole=True)
            if len(rows) > 1:
                raise DataError(
                    "an answer of several turns cannot be split", where=str(record.source), value=f"{len(rows)} turns",
                    remedy="set data.mask.thinking: as_template | keep_all",
                )  # fmt: skip
            made.append(rows[0][:2])
        return made

    def _refuse_split(self) -> None:
        if self.overlong == "split":
            raise RecipeError(
                "pairs and judged answers cannot be split into several rows", where="data.overlong", value="split",
                remedy="use drop, truncate_left, truncate_right, truncate_turns or error",
            )  # fmt: skip

    def _rows(self, record: Chat | Completion | Text | Segments | Tokens, *, whole: bool = False) -> list[Row]:
        if isinstance(record, Chat):
            return [self._chat(one, whole=whole) for one in self.per_answer(record)]
        if isinstance(record, Completion):
            return [self.raw.completion(record)]
        if isinstance(record, Segments):
            return [(*segments_row(record, self.raw.encoded, self.tokenizer.decode), ())]
        if isinstance(record, Tokens):
            return [(*tokens_row(record, self.vocabulary.size), ())]
        return [self.raw.text(record)]

    def per_answer(self, chat: Chat) -> list[Chat]:
        """`thinking: split`: one conversation per trained answer, ending with it; else the conversation itself."""
        if self.policy.thinking != "split":
            return [chat]
        weights = message_weights(chat, self.policy)
        ends = [i for i, weight in enumerate(weights) if weight and chat.messages[i]["role"] == "assistant"]
        rows = []
        for i in ends:
            only = [weights[k] if k == i else 0.0 for k in range(i + 1)]
            rows.append(replace(chat, messages=list(chat.messages[: i + 1]), weights=only))
        return rows or [chat]

    def _chat(self, chat: Chat, *, whole: bool = False) -> Row:
        masked = self.masker.mask(chat)
        if len(masked.encoded) > self.max_tokens and self.overlong == "truncate_turns" and not whole:
            shorter = overlong.fewer_turns(chat, lambda one: len(self.masker.mask(one).encoded) <= self.max_tokens)
            if shorter is not None:
                trained = int(np.count_nonzero(masked.weights_T))
                chat, masked = shorter, self.masker.mask(shorter)
                self._note(
                    "cut by truncate_turns", trained - int(np.count_nonzero(masked.weights_T)),
                    "trained tokens left out",
                )  # fmt: skip
        self._note_masked(masked)
        encoded = masked.encoded
        cuts = []
        for turn in masked.turns if len(encoded) > self.max_tokens else ():  # nobody cuts a row that fits
            if chat.messages[turn.message]["role"] == "assistant":
                after = encoded.text[turn.end :]
                reach = turn.end + len(after) - len(after.lstrip())
                cuts.append(int(np.searchsorted(encoded.end_T, reach, side="right")))
        return encoded.ids_T, masked.weights_T, tuple(sorted({*cuts}))

    def _slices(self, record: Record, weights_T: np.ndarray, cuts: Sequence[int]) -> list[tuple[int, int]]:
        """The stretches of a row that become samples."""
        limit, length = self.max_tokens, len(weights_T)
        if length <= limit:
            return [(0, length)]
        if self.overlong == "drop":
            raise Dropped("longer than data.max_tokens")
        if self.overlong == "truncate_left":
            return [(length - limit, length)]
        if self.overlong == "truncate_right":
            return [(0, limit)]
        if self.overlong == "split":
            return split(weights_T, limit, cuts)
        if self.overlong == "truncate_turns":
            raise Dropped("longer than data.max_tokens, and there is no earlier turn to leave out")
        raise self._too_long(record.source, length)

    def _note(self, what: str, amount: int, of: str, *, warn: bool = False) -> None:
        before = self.changes[what].amount if what in self.changes else 0
        self.changes[what] = Change(before + amount, of, warn)

    def _note_masked(self, masked: Masked) -> None:
        self.escaped += masked.escaped
        self.reasoned += len(masked.reasoned)
        self.unshown_reasoning += len(masked.unshown)
        if masked.escaped:
            let = self.policy.injection == "allow"
            how = "let through" if let else "made plain text"
            self._note(f"with control strings {how}", masked.escaped, "control strings", warn=let)
        if masked.unshown:
            self._note("without the reasoning that the template leaves out", len(masked.unshown), "answers")

    def _note_cuts(self, rows: Sequence[Row], made: Sequence[Sample]) -> None:
        if not made or all(len(tokens_T) <= self.max_tokens for tokens_T, _, _ in rows):
            return
        lost = sum(int(np.count_nonzero(row[1])) for row in rows) - sum(sample.scored for sample in made)
        if self.overlong == "split":
            self._note("split into several", len(made), "rows")
        else:
            self._note(f"cut by {self.overlong}", lost, "trained tokens left out")

    def _too_long(self, source: Source, length: int) -> DataError:
        return DataError(
            "the row is longer than data.max_tokens", where=str(source), value=f"{length} tokens",
            remedy="raise data.max_tokens, or set data.overlong to one that drops, cuts or splits",
        )  # fmt: skip


def _longest(sides: Sequence[pairs.Side]) -> int:
    return max(len(tokens_T) for tokens_T, _ in sides)


def _piece(tokens_T: np.ndarray, weights_T: np.ndarray) -> Piece:
    return Piece(cast(Sequence[int], tokens_T), cast(Sequence[float], weights_T))
