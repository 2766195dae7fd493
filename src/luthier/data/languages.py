"""Which language a text is in: by its script, then by letters, frequent words and trigrams of letters.

    1. letters by script: kana -> ja, hangul -> ko, han -> zh, Hebrew, Greek, Thai, Devanagari … by themselves; Arabic
       letters by those that only Persian or Urdu has
    2. Latin and Cyrillic among the languages of languages.json (18 and 4: 150 to 500 frequent words each, the most
       frequent first). A language scores for each word that is among its words, more the fewer languages share it;
       loses for each letter that its alphabet lacks; and has the log-likelihood of the trigrams of the text under those
       of its words
    3. confidence = softmax of the scores over the languages of the script, times the share of that script's letters

Code, addresses and placeholders are looked past. Without letters there is no language: None. A han character counts as
three letters, about what it says. At most 1200 characters are read: beginning, middle and end.

Leaves out other languages of these scripts, which are taken for their neighbour with less confidence, and dialects.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.repairs import without_code

UNKNOWN = "unknown"
_NOISE = re.compile(r"https?://\S+|www\.\S+|\S+@\S+\.\w+|<[A-Z_]+_\d+>|\\[a-zA-Z]+|\{\{.*?\}\}|</?\w[^<>]{0,80}>")
_LETTERS = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_HAN_LETTERS = 3  # what one character is worth in letters
_LONGEST, _PART = 1200, 400
_SCRIPTS = {
    "kana": "\u3041-\u3096\u30a1-\u30fa\u30fc", "hangul": "\u1100-\u11ff\uac00-\ud7af",
    "han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff", "latin": "A-Za-zÀ-ÖØ-öø-ɏ\u1e00-\u1eff",
    "cyrillic": "\u0400-\u052f",
    "arabic": "\u0620-\u06ff", "he": "\u05d0-\u05ea", "el": "\u0370-\u03ff\u1f00-\u1fff",
    "th": "\u0e01-\u0e3a\u0e40-\u0e4e", "hi": "\u0900-\u097f", "bn": "\u0980-\u09ff", "pa": "\u0a00-\u0a7f",
    "gu": "\u0a80-\u0aff", "ta": "\u0b80-\u0bff", "te": "\u0c00-\u0c7f", "kn": "\u0c80-\u0cff",
    "ml": "\u0d00-\u0d7f", "si": "\u0d80-\u0dff", "lo": "\u0e80-\u0eff", "bo": "\u0f00-\u0fff",
    "my": "\u1000-\u109f", "ka": "\u10a0-\u10ff", "am": "\u1200-\u137f", "km": "\u1780-\u17ff", "hy": "\u0530-\u058f",
}  # fmt: skip
_OF_SCRIPT = {name: re.compile(f"[{letters}]") for name, letters in _SCRIPTS.items()}
_CYRILLIC = ("ru", "uk", "bg", "sr")
_ALPHABETS = {
    "en": "", "id": "", "de": "äöüß", "fr": "àâæçéèêëîïôœùûüÿ", "es": "áéíñóúü", "pt": "áâãàçéêíóôõú", "it": "àèéìòù",
    "nl": "ëïéöè", "sv": "åäöé", "da": "æøåé", "no": "æøåéòô", "fi": "äöå", "pl": "ąćęłńóśźż", "cs": "áčďéěíňóřšťúůýž",
    "ro": "ăâîșțşţ", "hu": "áéíóöőúüű", "tr": "çğıöşüâîİ",
    "vi": "àáảãạăằắẳẵặâầấẩẫậđèéẻẽẹêềếểễệìíỉĩịòóỏõọôồốổỗộơờớởỡợùúủũụưừứửữựỳýỷỹỵ",
    "ru": "абвгдеёжзийклмнопрстуфхцчшщъыьэюя", "uk": "абвгґдеєжзиіїйклмнопрстуфхцчшщьюя",
    "bg": "абвгдежзийклмнопрстуфхцчшщъьюя", "sr": "абвгдђежзијклљмнњопрстћуфхцчџш",
}  # fmt: skip
_PERSIAN, _URDU = re.compile("[پچژگکی]"), re.compile("[ٹڈڑںےہ]")
_FOREIGN, _WORD, _TRIGRAMS, _SHARPNESS, _UNSEEN = 2.5, 2.2, 0.5, 1.8, 2e-5


@dataclass(frozen=True, slots=True)
class Guess:
    """A language, how sure that is, and how many letters spoke for it."""

    language: str
    confidence: float
    letters: int


@dataclass(frozen=True)
class _Profiles:
    """The languages of one script: columns of the table of trigrams, and what each word is worth to whom."""

    languages: tuple[str, ...]
    words: Mapping[str, tuple[tuple[int, float], ...]]  # word -> (language, worth)
    rows: Mapping[str, int]  # trigram -> row of the table; row 0 = unseen
    table: NDArray[Any]  # log probabilities
    alphabets: tuple[frozenset[str], ...]


def guess(text: str) -> Guess | None:
    """The language that most of the text is in; None where it holds no letters."""
    shown = _NOISE.sub(" ", without_code(_sampled(text)))
    counts = {name: len(pattern.findall(shown)) for name, pattern in _likely_scripts(shown)}
    if "han" in counts:
        counts["han"] *= _HAN_LETTERS
        if counts.get("kana", 0) * 20 > counts["han"]:
            counts["kana"] += counts.pop("han")
        elif counts.get("hangul", 0) * 6 > counts["han"]:
            counts["hangul"] += counts.pop("han")
    counts = {name: count for name, count in counts.items() if count}
    if not counts:
        return None
    script = max(counts, key=lambda name: (counts[name], name))
    share = counts[script] / sum(counts.values())
    if script in ("latin", "cyrillic"):
        language, sure = _among(shown, script)
        return Guess(language, round(sure * share, 3), counts[script])
    named = {"kana": "ja", "hangul": "ko", "han": "zh", "arabic": _arabic(shown)}
    return Guess(named.get(script, script), round(share, 3), counts[script])


def shares(texts: Iterable[str]) -> tuple[dict[str, float], float]:
    """Of texts said after another, the share of letters in each language, largest first; and the mean confidence."""
    guesses = [found for found in (guess(text) for text in texts) if found]
    total = sum(found.letters for found in guesses)
    if not total:
        return {}, 0.0
    letters: Counter[str] = Counter()
    for found in guesses:
        letters[found.language] += found.letters
    ranked = sorted(letters.items(), key=lambda entry: (-entry[1], entry[0]))
    largest = ranked[0][0]
    sure = sum(found.confidence * found.letters for found in guesses if found.language == largest) / letters[largest]
    return {language: round(count / total, 3) for language, count in ranked}, round(sure, 3)


def known() -> tuple[str, ...]:
    """Every code that a guess may give."""
    by_script = [name for name in _SCRIPTS if len(name) == 2]
    return tuple(sorted({*_listed(), *by_script, "zh", "ja", "ko", "ar", "fa", "ur"}))


def _sampled(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    middle = (len(text) - _PART) // 2
    return "\n".join((text[:_PART], text[middle : middle + _PART], text[-_PART:]))


def _likely_scripts(text: str) -> Iterable[tuple[str, re.Pattern[str]]]:
    return [("latin", _OF_SCRIPT["latin"])] if text.isascii() else _OF_SCRIPT.items()


def _arabic(text: str) -> str:
    letters = max(1, len(_OF_SCRIPT["arabic"].findall(text)))
    if len(_URDU.findall(text)) * 25 > letters:
        return "ur"
    return "fa" if len(_PERSIAN.findall(text)) * 50 > letters else "ar"


def _among(text: str, script: str) -> tuple[str, float]:
    """The best of the languages of one script, and its softmax."""
    profiles = _profiles(script)
    words = [word.lower().replace("’", "'") for word in _LETTERS.findall(text)]
    counted = Counter(words)
    scores = np.zeros(len(profiles.languages))
    for word, count in counted.items():
        for language, worth in profiles.words.get(word, ()):
            scores[language] += worth * min(count, 3)
    rows = [profiles.rows.get(gram, 0) for word in counted for gram in _grams(word)]
    if rows:  # of no word nothing is known: marks of a script that are no letters
        scores += profiles.table[rows].mean(axis=0) * math.sqrt(len(rows)) * _TRIGRAMS
    letters = Counter("".join(words) if not text.isascii() else "")
    for language, alphabet in enumerate(profiles.alphabets):
        scores[language] -= _FOREIGN * sum(min(count, 5) for letter, count in letters.items() if letter not in alphabet)
    best = int(np.argmax(scores))
    size = math.sqrt(len(words) + 1)  # words of one text depend on each other: evidence grows with the root
    return profiles.languages[best], float(1 / np.exp(_SHARPNESS * (scores - scores[best]) / size).sum())


def _grams(word: str) -> list[str]:
    padded = f" {word} "
    return [padded[i : i + 3] for i in range(len(padded) - 2)]


@cache
def _listed() -> dict[str, list[str]]:
    read = json.loads(Path(__file__).with_name("languages.json").read_text("utf-8"))
    return {language: text.split() for language, text in read.items()}


@cache
def _profiles(script: str) -> _Profiles:
    """Of the words of languages.json. A trigram counts by the ranks of its words; a word by how few languages share
    it."""
    listed = {
        language: words for language, words in _listed().items() if (language in _CYRILLIC) == (script == "cyrillic")
    }
    languages = tuple(listed)
    owners = Counter(word for words in listed.values() for word in set(words))
    worth: dict[str, list[tuple[int, float]]] = {}
    counts: dict[str, dict[int, float]] = {}
    for number, words in enumerate(listed.values()):
        for rank, word in enumerate(words):
            worth.setdefault(word, []).append((number, _WORD / owners[word] * (1.0 if len(word) > 1 else 0.5)))
            for gram in _grams(word):
                of_gram = counts.setdefault(gram, {})
                of_gram[number] = of_gram.get(number, 0.0) + 1 / math.sqrt(rank + 4)
    table = np.zeros((len(counts) + 1, len(languages)))
    for row, gram in enumerate(counts, 1):
        for number, count in counts[gram].items():
            table[row, number] = count
    table = np.log(table / table.sum(axis=0) + _UNSEEN)
    plain = set("abcdefghijklmnopqrstuvwxyz'")
    alphabets = tuple(frozenset(_ALPHABETS[language]) | plain for language in languages)
    rows = {gram: row for row, gram in enumerate(counts, 1)}
    return _Profiles(languages, {word: tuple(pairs) for word, pairs in worth.items()}, rows, table, alphabets)
