"""Repairs of one text, each a pure function that returns the text itself where nothing is wrong.

    lines       CRLF, CR, form feed, U+2028/2029 and U+0085 become \\n
    mojibake    UTF-8 once read as Windows-1252: undone where the whole text turns back into valid UTF-8 and the result
                is made of ordinary letters and marks. One odd pair in a text that does not turn back proves nothing
    composed    Unicode NFC: é as one character
    visible     zero width, control and byte order marks, terminal colours, lone surrogates; but joiners stay in emoji
                and in the scripts that write with them, direction marks beside right-to-left letters
    spaced      no-break spaces as spaces, trailing spaces (but Markdown's two), more than two blank lines
    entities    &amp; and the like                  tags    HTML tags by name; <think>, <EMAIL_1>, List<String> are none

`outside_code` applies a repair to what stands outside fenced blocks and `code`, so that code keeps every byte; `prose`
finds those stretches. Texts that are JSON are not for these repairs.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable

_CODE = re.compile(
    r"(?m)^ {0,3}(?P<fence>`{3,}|~{3,})[^\n]*\n(?s:.*?)(?:^ {0,3}(?P=fence)[`~]*[ \t]*$|\Z)|"
    r"(?<!`)(?P<tick>`{1,2})(?!`)[^`\n]+(?P=tick)(?!`)"
)
_LINES = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_INVISIBLE = re.compile(
    "\x1b\\[[0-9;?]{0,16}[A-Za-z]|[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_JOINERS, _DIRECTIONS, _BREAK = (
    "\u200c\u200d",
    "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    "\u200b",
)
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
_NO_BREAK = re.compile("[\xa0\u2007\u202f]")
_NO_BREAK_RUN = re.compile("(?<=[^ \n\xa0\u2007\u202f])[ \xa0\u2007\u202f]*[\xa0\u2007\u202f][ \xa0\u2007\u202f]*")
_TRAILING = re.compile(r"(?<![ \t])(?:[ \t]+)(?=\n)")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){3,}")
_ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,30}|#\d{1,7}|#[xX][0-9A-Fa-f]{1,6});")
_INLINE = "a|abbr|b|bdi|cite|del|em|font|i|ins|mark|q|s|small|span|strike|strong|sub|sup|u|img|label|code|kbd|tt|big"
_BLOCK = (
    "address|article|aside|blockquote|body|br|center|dd|div|dl|dt|figure|figcaption|footer|form|h[1-6]|head|header|hr|html|"
    "li|main|nav|ol|p|pre|section|table|tbody|td|tfoot|th|thead|tr|ul|title|meta|link|button|input|iframe|!doctype"
)
_ATTRIBUTES = (
    r"(?:\s+(?:[A-Za-z:@-][\w:.-]{0,40}\s*=\s*(?:\"[^\"<>]{0,2000}\"|'[^'<>]{0,2000}'|[^\s\"'<>=]{1,500})|disabled|checked|hidden|"
    r"selected|async|defer|html|nowrap|controls|required|readonly|noshade)){0,20}\s*/?"
)
_HIDDEN = re.compile(
    r"<(script|style)\b[^<>]{0,2000}>.{0,20000}?</\1\s*>|<!--.{0,20000}?-->", re.IGNORECASE | re.DOTALL
)
_BLOCK_TAG = re.compile(rf"[ \t]*</?(?:{_BLOCK}){_ATTRIBUTES}>[ \t]*", re.IGNORECASE)
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE}){_ATTRIBUTES}>", re.IGNORECASE)
# The byte behind each character of Windows-1252; its holes are Latin-1 controls, as in browsers.
_BYTES = {bytes([i]).decode("cp1252", "ignore") or chr(i): i for i in range(128, 256)}
_BYTES |= {chr(i): i for i in range(128, 160)}  # read as Latin-1
_SUSPECT = re.compile("[\xc2-\xf4][" + re.escape("".join(c for c, byte in _BYTES.items() if byte < 0xC0)) + "]")
_CERTAIN = "\xc3\xe2\xf0"  # lead bytes that as letters are hardly ever followed by such marks
_Repair = Callable[[str], str]


def lines(text: str) -> str:
    return _LINES.sub("\n", text) if _LINES.search(text) else text


def composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def mojibake(text: str) -> str:
    """Undone once or, where it was done twice, twice."""
    for _ in range(2):
        seen = _SUSPECT.findall(text)
        if not seen or (len(seen) < 2 and seen[0][0] not in _CERTAIN):
            return text
        raw = bytearray()
        for letter in text:
            byte = ord(letter) if ord(letter) < 128 else _BYTES.get(letter)
            if byte is None:
                return text
            raw.append(byte)
        try:
            read = raw.decode("utf-8")
        except UnicodeDecodeError:
            return text
        if not all(letter.isascii() or _is_ordinary(letter) for letter in read):
            return text
        text = read
    return text


def _is_ordinary(letter: str) -> bool:
    """A letter or mark that texts are made of: no control, no unassigned code, nothing private; no phonetic signs."""
    return unicodedata.category(letter) not in ("Cc", "Cn", "Co", "Cs") and not 0x250 <= ord(letter) < 0x300


def visible(text: str) -> str:
    """Without what nobody sees and every tokenizer does."""
    if not _INVISIBLE.search(text):
        return text
    right_to_left = bool(_RIGHT_TO_LEFT.search(text))

    def judged(match: re.Match[str]) -> str:
        sign = match.group()
        before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
        if sign in _DIRECTIONS:
            return sign if right_to_left else ""
        if sign in _JOINERS:
            return sign if _joins(before) and _joins(after) else ""
        return sign if sign == _BREAK and _south_east(before) and _south_east(after) else ""

    return _INVISIBLE.sub(judged, text)


def _joins(letter: str) -> bool:
    """Emoji and their signs, Arabic, Syriac, the scripts of India, Mongolian: what joiners are written with."""
    return bool(letter) and (0x600 <= ord(letter) < 0xE00 or 0x1800 <= ord(letter) < 0x18B0
                             or unicodedata.category(letter) in ("So", "Sk", "Mn", "Me"))  # fmt: skip


def _south_east(letter: str) -> bool:
    """Thai, Lao, Burmese, Khmer: no spaces between words, so that a zero width one says something."""
    return bool(letter) and (
        0xE00 <= ord(letter) < 0xF00 or 0x1000 <= ord(letter) < 0x10A0 or 0x1780 <= ord(letter) < 0x1800
    )


def spaced(text: str) -> str:
    if _NO_BREAK.search(text):
        text = _NO_BREAK.sub(" ", _NO_BREAK_RUN.sub(" ", text))
    if " \n" in text or "\t\n" in text:
        text = _TRAILING.sub(lambda match: "  " if _is_break(text, match) else "", text)
    return _BLANK_LINES.sub("\n\n\n", text)


def _is_break(text: str, match: re.Match[str]) -> bool:
    """Markdown's hard line break: two spaces between two lines with words."""
    before, after = text[match.start() - 1 : match.start()], text[match.end() + 1 : match.end() + 2]
    return match.group() == "  " and before not in ("", "\n") and after not in ("", "\n")


def entities(text: str) -> str:
    return _ENTITY.sub(lambda match: html.unescape(match.group()), text) if "&" in text else text


def tags(text: str) -> str:
    """Without HTML tags: what stood in a block of its own stays on a line of its own."""
    if "<" not in text:
        return text
    shown = _HIDDEN.sub("", text)
    return _INLINE_TAG.sub("", re.sub(r"\n{3,}", "\n\n", _BLOCK_TAG.sub("\n", shown))) if "<" in shown else shown


def outside_code(text: str, repair: _Repair) -> str:
    """The repair applied to the stretches outside code."""
    if "`" not in text and "~~~" not in text:
        return repair(text)
    made, at = [], 0
    for match in _CODE.finditer(text):
        made += [repair(text[at : match.start()]), match.group()]
        at = match.end()
    return "".join([*made, repair(text[at:])])


def without_code(text: str) -> str:
    """The text without its code."""
    return text if "`" not in text and "~~~" not in text else _CODE.sub(" ", text)
