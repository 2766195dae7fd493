"""Where prompts begin and end: the words of `positions`, padded rows, packed forests, and calls of a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from luthier.contracts.batch import Batch
from luthier.contracts.errors import ModelError, RecipeError
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.collate import collate
from luthier.models.prompt_edges import (
    Edges,
    PromptsDiffer,
    batch_labels,
    edited_rows,
    nothing_edited,
    own_paths,
    parse_positions,
    path_labels,
    prompts_of,
)
from luthier.models.prompt_watch import PromptWatch, row_labels, watch_prompts
from luthier.models.sites import detach
from luthier.models.unpacked import paths_of
from tiny import tiny

CPU = torch.device("cpu")
TWO = Edges(2, 2)


def row(prompt: int, answer: int, at: int = 0) -> Sample:
    weights = [0.0] * prompt + [1.0] * answer
    return Sample((Piece(list(range(3, 3 + prompt + answer)), weights),), Source("rows.jsonl", at + 1), id=at)


def tree(prompt: int, *answers: list[float]) -> Sample:
    pieces = [Piece([3] * len(weights), list(weights), parent=0) for weights in answers]
    root = Piece([4] * prompt, [0.0] * prompt)
    return Sample((root, *pieces), Source("trees.jsonl", 7), id=0, sequences=tuple(range(1, len(pieces) + 1)))


def text(batch: Batch, edges: Edges = TWO) -> str:
    return "".join(".fl"[label] for label in batch_labels(batch, edges).tolist())


def test_positions_are_read() -> None:
    assert parse_positions("f7+l7") == Edges(7, 7)
    assert parse_positions("f3") == Edges(3, 0)
    assert parse_positions("l1") == Edges(0, 1)
    assert parse_positions("all") is None


@pytest.mark.parametrize("wrong", ["", "7", "f", "l7+f7", "f0", "f7+l0", "f-1", "f7 + l7", "F7", "none", "f9999999"])
def test_other_words_are_refused(wrong: str) -> None:
    with pytest.raises(RecipeError, match=r"f7\+l7") as caught:
        parse_positions(wrong)
    assert caught.value.where == "method.positions"


def test_the_two_edges_never_meet() -> None:
    for first in range(5):
        for last in range(5):
            for prompt in range(12):
                p, q = Edges(first, last).of(prompt)
                assert p <= first and q <= last and p + q <= prompt
                assert (p, q) == (first, last) or prompt < 2 * max(first, last)
    assert Edges(7, 7).of(1) == (0, 1)
    assert Edges(7, 7).of(5) == (2, 3)
    assert Edges(3, 0).of(2) == (2, 0)


def test_padding_on_either_side_is_no_prompt() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0] * 7]) != 0
    labels = row_labels(real, TWO)
    assert labels.tolist() == [[0, 0, 1, 1, 0, 2, 2], [1, 1, 0, 0, 0, 2, 2], [1, 2, 2, 0, 0, 0, 0], [0] * 7]


def test_a_prompt_ends_before_the_first_target() -> None:
    assert text(collate([row(6, 3), row(1, 4, 1), row(3, 2, 2)])) == "ff..ll..." + "l...." + "fll.."


def test_later_turns_do_not_move_it() -> None:
    weights = [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    sample = Sample((Piece(list(range(11)), [float(w) for w in weights]),), Source("rows.jsonl", 1), id=0)
    assert text(collate([sample])) == "ff.ll......"


def test_a_shared_prompt_is_edited_once() -> None:
    assert text(collate([tree(5, [1, 1, 1], [1, 1])])) == "ff.ll" + "..." + ".."


def test_a_prompt_may_end_in_the_answers_where_they_agree() -> None:
    """Answers that begin with two untrained tokens: the last two of the prompt are theirs."""
    assert text(collate([tree(5, [0, 0, 1], [0, 0, 1, 1])])) == "ff..." + "ll." + "ll.."


def test_answers_that_disagree_cannot_run_in_one_tree() -> None:
    batch = collate([row(4, 2), tree(5, [1, 1], [0, 1, 1])])
    with pytest.raises(PromptsDiffer):
        batch_labels(batch, TWO)
    assert text(batch, Edges(2, 0)) == "ff...." + "ff..." + ".." + "..."
    (plain,), (one,), (other,) = own_paths(batch)
    assert path_labels(batch, [plain], TWO).tolist() == [[1, 1, 2, 2, 0, 0]]
    assert path_labels(batch, [one], TWO).tolist() == [[1, 1, 0, 2, 2, 0, 0]]
    assert path_labels(batch, [other], TWO).tolist() == [[1, 1, 0, 0, 2, 2, 0, 0]]


def test_a_scored_prompt_is_a_sequence_with_a_prompt_of_its_own() -> None:
    """ORPO scores the whole text: the prompt by itself begins after one token."""
    root = Piece([4] * 5, [0.0, 1.0, 1.0, 1.0, 1.0])
    leaves = [Piece([3] * n, [1.0] * n, parent=0) for n in (2, 3)]
    batch = collate([Sample((root, *leaves), Source("t.jsonl", 1), id=0, sequences=(1, 2, 0))])
    with pytest.raises(PromptsDiffer):
        batch_labels(batch, TWO)
    with pytest.raises(PromptsDiffer):
        path_labels(batch, paths_of(batch)[0], TWO)
    found = [path_labels(batch, paths, TWO).tolist() for paths in own_paths(batch)]
    assert found == [[[2, 0, 0, 0, 0]], [[1, 1, 0, 2, 2, 0, 0]], [[1, 1, 0, 2, 2, 0, 0, 0]]]
    assert sorted(i for paths in own_paths(batch) for path in paths for i in path.scored) == list(range(batch.scored))


def test_an_answer_that_is_not_read_has_no_say() -> None:
    pieces = (Piece([4] * 5, [0.0] * 5), Piece([3] * 2, [1.0] * 2, parent=0), Piece([3] * 3, [0.0] * 3, parent=0))
    sample = Sample(pieces, Source("trees.jsonl", 1), id=0, sequences=(1,))
    assert text(collate([sample])) == "ff.ll" + ".." + "..."


def test_without_a_target_nothing_is_a_prompt() -> None:
    batch = collate([row(4, 2)])
    none = replace(batch, scored_N=batch.scored_N[:0], sequence_N=batch.sequence_N[:0])
    assert text(none) == "......"


def test_where_a_score_is_read_the_whole_row_is_the_prompt() -> None:
    batch = collate([row(4, 3)])
    assert batch.last_Q is not None
    assert text(replace(batch, scored_N=batch.last_Q, sequence_N=torch.arange(1))) == "ff...ll"


def test_paths_run_as_rows_find_the_same_labels() -> None:
    batch = collate([row(4, 3), tree(5, [1, 1], [1, 1])])
    with prompts_of(batch, paths_of(batch)[0]):
        first, last = edited_rows(TWO, 21, CPU)
    assert (first.tolist(), last.tolist()) == ([0, 1, 7, 8, 14, 15], [2, 3, 10, 11, 17, 18])


def test_rows_are_worked_out_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    name = "luthier.models.prompt_edges.batch_labels"
    monkeypatch.setattr(name, lambda batch, edges: calls.append(1) or batch_labels(batch, edges))
    batch = collate([row(4, 2)])
    for _ in range(2):
        with prompts_of(batch):
            assert edited_rows(TWO, 6, CPU)[0] is edited_rows(TWO, 6, CPU)[0]
    assert calls == [1]


def test_the_outermost_facts_hold() -> None:
    with nothing_edited(), prompts_of(collate([row(4, 2)])):
        assert [len(rows) for rows in edited_rows(TWO, 6, CPU)] == [0, 0]


def test_outside_of_any_pass_a_site_says_so() -> None:
    with pytest.raises(ModelError, match="forward pass"):
        edited_rows(TWO, 6, CPU)
    with prompts_of(collate([row(4, 2)])), pytest.raises(ModelError, match="returns 5 rows where 6"):
        edited_rows(TWO, 5, CPU)


class Asking(nn.Module):
    """A decoder that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: tuple[list[int], list[int]] | None = None

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, **more) -> None:
        rows = input_ids if inputs_embeds is None else inputs_embeds
        first, last = edited_rows(TWO, rows.shape[0] * rows.shape[1], CPU)
        self.told = first.tolist(), last.tolist()


def filled(tokens: int) -> DynamicCache:
    cache = DynamicCache()
    if tokens:
        cache.update(torch.zeros(1, 1, tokens, 2), torch.zeros(1, 1, tokens, 2), 0)
    return cache


def test_native_calls() -> None:
    decoder = Asking()
    watch, ids = PromptWatch(decoder), torch.ones(2, 5, dtype=torch.int64)
    watch(ids)
    assert decoder.told == ([0, 1, 5, 6], [3, 4, 8, 9])
    watch(inputs_embeds=torch.ones(1, 3, 8), past_key_values=filled(0))
    assert decoder.told == ([0], [1, 2])
    watch(ids, torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))
    assert decoder.told == ([1, 2, 5, 6], [3, 4, 8, 9])
    watch(ids[:1, :1], torch.ones(1, 6), past_key_values=filled(5))
    assert decoder.told == ([], [])


def test_a_mask_that_hides_the_padding_is_refused() -> None:
    watch = PromptWatch(Asking())
    with pytest.raises(ModelError, match="attention mask"):
        watch(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 1, 3, 3))


def test_the_watch_goes_away_again() -> None:
    model = tiny("llama")
    names = [name for name, _ in model.named_modules()]
    watch_prompts(model)
    assert isinstance(model.base_model, PromptWatch)
    detach(model)
    assert [name for name, _ in model.named_modules()] == names


def test_a_model_that_is_its_own_decoder_is_refused() -> None:
    with pytest.raises(RecipeError, match="positions: all"):
        watch_prompts(tiny("llama").model)
