"""Word by word or by the library: the same ids and the same characters, over tokenizers, scripts and wild texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from luthier.data.vocabulary import Encoded, Vocabulary
from luthier.data.words import quick_words, translated
from tiny import tiny_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "the cat sat on the mat, it's 1234 o'clock\n\n  and they'll go",
    "Ünï cödé 你好 — “quotes”",
    "a\r\n\tb    c " * 5,
]
SCRIPTS = "abzAZ 019.,'’\n\r\t-_<>|/ \u00e9e\u0301ü中文あ—“”🙂\u2028\u00a0\x1c\x00ſK가½²"
Answer = tuple[list[int], list[int], list[int]]
MARKERS = ["<|im_start|>", "<|im_end|>", "<tool>", "<|im"]


def trained(pattern: str | None, normalizer: Any = None, merges: int = 400) -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer, as GPT-2 (no pattern) or as Llama 3 and Qwen are made."""
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizer
    if pattern is None:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(CORPUS * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>")
    made.add_tokens([AddedToken(text, special=i % 2 == 0, normalized=i % 2 == 1) for i, text in enumerate(MARKERS)])
    return made


KINDS = {
    "gpt2": lambda: trained(None), "llama3": lambda: trained(LLAMA3), "o200k": lambda: trained(O200K),
    "qwen": lambda: trained(QWEN, normalizers.NFC()), "bytes": tiny_tokenizer,
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(KINDS))
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    made = Vocabulary(KINDS[request.param]())
    assert made.quick is not None
    return made


def plain(vocabulary: Vocabulary, text: str) -> Encoded:
    made = vocabulary.backend.encode(text, add_special_tokens=False)
    return vocabulary._encoded(text, made.ids, made.offsets)


def quick(vocabulary: Vocabulary, text: str) -> Answer | None:
    """ids, starts and ends by the quick way; None where it leaves the text to the library."""
    assert vocabulary.quick is not None
    found = vocabulary.quick.encode(text)
    if found is None:
        return None
    if found[3]:
        assert np.array_equal(found[1][1:], found[2][:-1]) and (found[2] > found[1]).all()
    return found[0].tolist(), found[1].tolist(), found[2].tolist()


def library(vocabulary: Vocabulary, text: str) -> Answer:
    made = plain(vocabulary, text)
    return made.ids_T.tolist(), made.start_T.tolist(), made.end_T.tolist()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(st.text(SCRIPTS, max_size=12), st.sampled_from([*MARKERS, "</s>", "it's", " word"])), max_size=9)
)
def test_wild_texts(vocabulary: Vocabulary, parts: list[str]) -> None:
    text = "".join(parts)
    found = quick(vocabulary, text)
    assert found is None or found == library(vocabulary, text)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_letters(vocabulary: Vocabulary, text: str) -> None:
    found = quick(vocabulary, text)
    assert found is None or found == library(vocabulary, text)


@settings(max_examples=100, deadline=None)
@given(st.text("ab'sS \n\r\t.9\x0b\x1c", max_size=30), st.data())
def test_spans_of_joined_tokens(vocabulary: Vocabulary, text: str, data: st.DataObject) -> None:
    """`inside` by bisection is `inside` by comparison, or falls back to it."""
    made = vocabulary.encode(text)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    slow = Encoded(made.text, made.ids_T, made.start_T, made.end_T)
    assert len(text) == 0 or made.joined
    try:
        expected = slow.inside(start, end).tolist()
    except Exception as error:  # noqa: BLE001 - both ways must refuse alike
        with pytest.raises(type(error)):
            made.inside(start, end)
    else:
        assert made.inside(start, end).tolist() == expected


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "alpaca_zh_demo.json", "glaive_toolcall_en_demo.json"])
def test_real_texts(vocabulary: Vocabulary, name: str, shared_data: Callable[[str], Path]) -> None:
    text = shared_data("raw/llamafactory").joinpath(name).read_text(encoding="utf-8")[:400_000]
    pieces = [text[i : i + 997] for i in range(0, len(text), 4001)]
    assert [quick(vocabulary, piece) for piece in pieces] == [library(vocabulary, piece) for piece in pieces]


@pytest.mark.parametrize(
    "name", ["raw/tokenizers/torchtune_test/tokenizer.json", "models/stories260K-hf/tokenizer.json"]
)
def test_real_tokenizers(name: str, shared_data: Callable[[str], Path]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(shared_data(name)))
    assert (quick_words(tokenizer) is not None) == ("torchtune" in name)
    vocabulary = Vocabulary(tokenizer)
    for text in ["Hello there!  It's 12345.\n\n", "naïve “quoted” text 你好 x", "  lead\ttab\r\n"]:
        made, expected = vocabulary.encode(text), plain(vocabulary, text)
        assert made.ids_T.tolist() == expected.ids_T.tolist() and made.start_T.tolist() == expected.start_T.tolist()


def test_what_does_more_than_cut_and_merge_is_left_to_the_library() -> None:
    stripping = trained(None)
    stripping.add_tokens([AddedToken("<x>", rstrip=True)])
    prefixed = trained(None)
    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    folded = trained(LLAMA3, normalizers.Lowercase())
    words = trained(LLAMA3)
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    dropping = trained(None)
    dropping.backend_tokenizer.model.dropout = 0.1
    for tokenizer in (stripping, prefixed, folded, words, dropping):
        assert quick_words(tokenizer) is None


def test_expressions_with_unknown_parts_are_not_translated() -> None:
    assert translated(LLAMA3) and translated(O200K)
    for pattern in (r"\w+", r"\p{Han}+", r"(\p{L}+)", r"\bx", "é+"):
        assert translated(pattern) is None
