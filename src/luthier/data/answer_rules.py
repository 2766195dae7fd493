"""What makes a prompt and its answer a bad row of instructions: rules that need no model, each one function.

    empty, placeholder, echo, refusal, truncated, url_only, repeated, symbols, boilerplate, wrong_language

Each is `rule(said) -> bool` over a `Said`; RULES maps names to (function, reason). They are made for short answers of
instruction data; the rules of web text (C4, Gopher, FineWeb: ends with a full stop, has stop words, mean word length)
would throw away most of it and code and mathematics with it. So a rule that counts signs looks past code, and a text
that calculates may hold as many as it needs. Rules look at the last answer; `wrong_language` compares it with what was
asked.

Leaves out whether an answer is right or useful: that takes a judge.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from luthier.data.languages import guess
from luthier.data.overlap import words
from luthier.data.repairs import without_code


@dataclass(frozen=True)
class Said:
    """A prompt and its answer; `most_repeated` and `least_letters` are the shares that `repeated` and `symbols`
    allow."""

    prompt: str
    asked: str  # the last thing the user said
    answer: str
    most_repeated: float = 0.5
    least_letters: float = 0.4

    @cached_property
    def words(self) -> list[str]:
        return words(self.answer)

    @cached_property
    def prose(self) -> str:
        return without_code(self.answer).strip()

    @cached_property
    def calculates(self) -> bool:
        """Mathematics, tables and data: signs are what they are made of."""
        return bool(_CALCULATES.search(self.answer))


_CALCULATES = re.compile(
    r"\d\s*[-+*/=^×÷<>|]\s*\$?\d|\\(?:frac|sum|int|sqrt|begin|left)|[=≈≤≥∑∫√]|\|.{0,200}\||^\s*[\[{(<]"
    r"|['\"]\s*[:,]\s*\\?['\"(\[{\d]|\d(?:[,;]?\s{1,3}\d+){4}",
    re.MULTILINE,
)
_PLACEHOLDER = re.compile(
    r"\W*(?:n/?a|not applicable|todo|to do|tbd|fixme|xxx+|no ?output|no ?input|null|nan|undefined|placeholder"
    r"|lorem ipsum.*|(?:your|the|insert|write|add|put|enter) (?:answer|response|output|text)(?: goes)? here"
    r"|(?:insert|enter) (?:answer|text)|(?:answer|response|output) ?: ?|content|string|text here"
    r"|sample (?:text|answer)|无|暂无|略|待补充|待定|同上|无输出|无答案)\W*",
    re.IGNORECASE | re.DOTALL,
)
_NOT = r"(?:do not|don't|can ?not|can't|am not|am unable|'m unable|'m not)"
_ABLE = r"(?:can ?not|can't|won't|will not|am unable to|'m unable to|am not able to)"
_HELP = (
    r"(?:assist|help|fulfil|comply|provide|create|generate|write|answer|do that|complete|continue|support|engage|access"
    r"|browse|process|view|see|open|discuss)"
)
_DECLINES = (
    rf"\bas an? (?:ai|artificial intelligence|large language)(?:[ -]\w+){{0,3}},? ?i {_NOT}",
    rf"\bas an? (?:ai )?(?:language )?(?:model|assistant),? i {_NOT}",
    rf"\bsorry,? (?:but )?(?:as an ai\b|i(?: am|'m) not programmed|i ?{_ABLE} {_HELP})",
    rf"^\W*(?:unfortunately, ?)?i ?{_ABLE} {_HELP}",
    r"\bmy (?:knowledge cut-?off|training data only)",
    r"\bi (?:do not|don't) have (?:personal (?:opinions|beliefs|experiences|feelings)"
    r"|access to (?:real-time|current|the internet|external))",
    r"(?:^|[，。,.；;：:\n])\W*作为一(?:个|款|名)?(?:AI|人工智能|大型?)?(?:语言)?(?:模型|助手|AI)[^。\n]{0,16}(?:无法|不能|没有|不具备|并不)",
    r"(?:很抱歉|抱歉|对不起|非常抱歉)[，,。]?(?:但)?(?:我|作为)[^。\n]{0,16}(?:无法|不能|没办法|没有能力)",
    r"^\W*我(?:无法|不能)(?:提供|回答|协助|帮助|完成|满足)",
)
_OFFERS = re.compile(
    r"\b(?:but|however|nevertheless|instead|still)\b.{0,40}\b(?:i can|here (?:is|are)|let me|i'd be happy|could|would|"
    r"you)|但我?(?:可以|能)"
    r"|然而|不过|但是",
    re.IGNORECASE | re.DOTALL,
)
_REFUSAL = re.compile("|".join(_DECLINES), re.IGNORECASE)
_URL = re.compile(r"(?:https?://|www\.)\S+|\b[a-z0-9-]+\.(?:com|org|net|io|cn)(?:/\S*)?", re.IGNORECASE)
_ASKS_URL = re.compile(r"\burls?\b|\blinks?\b|\bdomains?\b|web ?site|网址|链接|域名|网站", re.IGNORECASE)
_ASKS_SIGNS = re.compile(
    r"emoji|ascii|symbol|number|digit|code|sequence|random|password|date|morse|binary|表情|符号|数字|代码|密码|序列|随机",
    re.IGNORECASE,
)
_LETTER, _ALPHA = re.compile(r"[^\W_]"), re.compile(r"[^\W\d_]")
_ENDS = re.compile(
    r"[.!?…。！？:;»”\"'’)\]}>」』）】*_`|~=+%$€£°0-9✓♥-]\W*\Z|#\w+\Z|[^\x00-\u024f\u0370-\u052f\u4e00-\u9fff]\Z"
)
_DANGLING = re.compile(
    r"(?:[,，、（(\[{]|\b(?:and|or|but|the|a|an|of|to|in|with|for|that|which|is|are|was|because|by|from|as|und|der|die|das"
    r"|et|de|la|y|el)|\n\s*(?:\d{1,2}[.)]|[-*•]))\s*\Z"
)
_ITEM = re.compile(r"\s*(?:\d{1,3}[.)、:]|[-*•·])\s")
_SENTENCE = re.compile(r"[.!?。！？](?:\s|\Z|[\"”’)])")
_CODE_LINE = re.compile(r"[;{}]\s*$|^\s*(?:def|class|import|SELECT|#include)\b", re.MULTILINE)
_BOILERPLATE = (
    "all rights reserved", "privacy policy", "terms of use", "terms of service", "terms and conditions",
    "cookie policy", "cookies policy", "cookies to ensure", "cookies to improve", "cookies to give", "we use cookies",
    "subscribe to our newsletter", "subscribe to the newsletter", "sign up for our", "click here to",
    "click to enlarge", "javascript is", "javascript must be", "enable javascript", "share this post",
    "share on facebook", "share on twitter", "follow us on", "powered by wordpress", "add to cart", "read more »",
    "back to top", "skip to content", "leave a reply", "leave a comment", "版权所有", "转载请注明", "点击这里",
    "点击查看",
    "关注我们", "公众号", "责任编辑", "本文来源", "扫码关注",
)  # fmt: skip
_TONGUES = (
    "english|chinese|french|german|spanish|italian|portuguese|russian|japanese|korean|dutch|arabic|hindi|latin|polish"
    "|turkish|swedish|danish|greek|hebrew|vietnamese|thai|indonesian|mandarin|cantonese|ukrainian|languages?"
)
_NAMES_LANGUAGE = re.compile(
    rf"translat|traduc|tradui|übersetz|vertaal|перевед|перевод|\b(?:{_TONGUES})\b|code|program|翻译|译成|译为|英文|英语|中文"
    r"|汉语|法语|德语|日语|日文|韩语|俄语|西班牙语|语言|单词|句子|代码|编程|程序|函数",
    re.IGNORECASE,
)
_COMMON_ENGLISH = frozenset(
    (
        "the",
        "of",
        "and",
        "to",
        "in",
        "a",
        "is",
        "that",
        "it",
        "for",
        "you",
        "are",
        "with",
        "as",
        "this",
        "be",
        "on",
        "can",
    )
)
_SAME_LETTER = re.compile(r"([^\s\W_])\1{29,}|(\w{2,6})\2{19,}")
_LEAST_FOR_REPEATS, _GRAM, _LINES = 60, 10, 6
_LEAST_FOR_ENDING, _LAST_LINE = 40, 8
_BEGINNING, _LEAST_FOR_ANSWER = 300, 60
_SURE, _LETTERS_FOR_LANGUAGE = 0.9, 40


def empty(said: Said) -> bool:
    """No letter, digit or sign that says something."""
    return not said.answer.strip()


def placeholder(said: Said) -> bool:
    """N/A, TODO, nooutput: what a form held before anyone wrote."""
    return len(said.answer) < 400 and bool(
        _PLACEHOLDER.fullmatch(said.answer.strip()) or re.fullmatch(r"[\s.…\-_*#?]+", said.answer)
    )


def echo(said: Said) -> bool:
    """The answer is the question again, of three words or more."""
    asked = words(said.asked)
    return len(asked) >= 3 and said.words == asked


def refusal(said: Said) -> bool:
    """It begins by declining, and no answer follows a `but I can` or `however`."""
    shown = said.answer.replace("’", "'")
    declined = _REFUSAL.search(shown[:_BEGINNING])
    if not declined:
        return False
    return len(said.words) < _LEAST_FOR_ANSWER or not _OFFERS.search(
        shown[declined.end() : declined.end() + _BEGINNING]
    )


def truncated(said: Said) -> bool:
    """It stops in the middle: a code fence never closed, a comma or an `and` at the end, a long last line without
    end."""
    text = said.answer.rstrip()
    if sum(line.lstrip().startswith("```") for line in text.split("\n")) % 2:
        return True
    last = text.rpartition("\n")[2]
    if "```" in last or said.calculates or len(said.words) < _LEAST_FOR_ENDING:
        return False
    if _DANGLING.search(text[-40:]):
        return True
    if _ITEM.match(last) and sum(bool(_ITEM.match(line)) for line in text.split("\n")) > 1:
        return False  # the items of a list end as they like
    return (
        len(words(last)) >= max(_LAST_LINE, 2 * _median_line(text))
        and not _ENDS.search(text[-40:])
        and _is_sentences(text)
    )


def _median_line(text: str) -> float:
    lengths = sorted(len(line.split()) for line in text.split("\n") if line.strip())
    return 0.0 if len(lengths) < 2 else lengths[len(lengths) // 2] / 2


def _is_sentences(text: str) -> bool:
    """Prose that ends its other sentences: a poem, a list or code does not."""
    return len(_SENTENCE.findall(text)) >= 2 and not _CODE_LINE.search(text)


def url_only(said: Said) -> bool:
    """Nothing but addresses, which were not asked for."""
    if _URL.search(said.prompt) or _ASKS_URL.search(said.prompt):
        return False
    return bool(_URL.search(said.answer)) and len(_LETTER.findall(_URL.sub("", said.answer))) < 3


def repeated(said: Said) -> bool:
    """More than `most_repeated` of the words stand in phrases of ten, or of the lines, that came before."""
    if _SAME_LETTER.search(said.prose):
        return True
    spoken = words(said.prose) if said.prose != said.answer else said.words
    if len(spoken) >= _LEAST_FOR_REPEATS and not said.calculates and _again(spoken) > said.most_repeated:
        return True
    lines = [line.strip() for line in said.prose.split("\n") if len(line.split()) >= 2 or len(line.strip()) > 8]
    return len(lines) >= _LINES and sum(n - 1 for n in Counter(lines).values()) / len(lines) > said.most_repeated


def _again(spoken: list[str]) -> float:
    """Share of the words inside a phrase of ten words that stood before."""
    seen: set[tuple[str, ...]] = set()
    covered = [False] * len(spoken)
    for i in range(len(spoken) - _GRAM + 1):
        gram = tuple(spoken[i : i + _GRAM])
        if gram in seen:
            covered[i : i + _GRAM] = [True] * _GRAM
        seen.add(gram)
    return sum(covered) / len(spoken)


def symbols(said: Said) -> bool:
    """Hardly letters, outside code and sums."""
    signs = re.sub(r"\s+", "", said.prose)
    if len(signs) < 20 or said.calculates:
        return False
    return len(_ALPHA.findall(signs)) / len(signs) < said.least_letters and not _ASKS_SIGNS.search(said.prompt)


def boilerplate(said: Said) -> bool:
    """Two phrases of a web page's frame in one answer."""
    lowered = said.answer.lower()
    return sum(phrase in lowered for phrase in _BOILERPLATE) >= 2


def wrong_language(said: Said) -> bool:
    """Surely in another language than the question, which names none and asks for no translation or code."""
    if _plainly_english(said.asked) and _plainly_english(said.answer):
        return False
    if _NAMES_LANGUAGE.search(said.prompt):
        return False
    asked, answered = guess(said.asked), guess(said.prose)
    sure = asked and answered and min(asked.letters, answered.letters) >= _LETTERS_FOR_LANGUAGE
    return bool(
        sure
        and asked
        and answered
        and min(asked.confidence, answered.confidence) >= _SURE
        and asked.language != answered.language
    )


def _plainly_english(text: str) -> bool:
    if not text[:400].isascii():
        return False
    spoken = text[:400].lower().split()
    return sum(word in _COMMON_ENGLISH for word in spoken) >= 0.12 * len(spoken)


RULES: dict[str, tuple[Callable[[Said], bool], str]] = {
    "empty": (empty, "the answer is empty"),
    "placeholder": (placeholder, "the answer is a placeholder"),
    "echo": (echo, "the answer repeats the question"),
    "refusal": (refusal, "the answer declines"),
    "truncated": (truncated, "the answer breaks off"),
    "url_only": (url_only, "the answer is only an address"),
    "repeated": (repeated, "the answer repeats itself"),
    "symbols": (symbols, "the answer is mostly signs"),
    "boilerplate": (boilerplate, "the frame of a web page"),
    "wrong_language": (wrong_language, "answered in another language"),
}
