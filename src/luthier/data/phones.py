"""Telephone numbers: the forms people write, with enough proof that a date, a sum or an order number is none of them.

A candidate is a run of digits with single separators (space, dash, dot, slash, brackets). It is a number when one of
these holds; E.164 and the national plans are the source:

    +49 30 901820, 0049…      plus or 00, a country code that exists, 8 to 15 digits (E.164)
    138-1234-5678             China mobile: a prefix that is issued; 010-62345678, (021) 6234 5678; 400-810-8888
    (212) 555-0123, 1-212-…   North America: area and exchange 2-9 first, no N11, separators or a word that says so
    01 23 45 67 89, 030/901820, 07700 900123   Europe: trunk 0, 9 to 12 digits, at least one separator
    Tel: 665 1234             any 7 to 15 digits right after a word that says it is a telephone

Nothing is one right after a word that says what else it is (order, ISBN, version), after a currency, or as an operand.
Leaves out numbers in words and bare runs of 10 digits that nothing announces: they are as often counters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

# Where numbers are read: digits in groups. Bounded, so that the search is linear.
CANDIDATE = re.compile(
    r"(?<![\w.+$€£¥#@/\\-])(?<!\d[,:( ])(?:\+|00(?=[1-9]))?(?:\(\+?\d{1,5}\)|\d+)(?:(?: ?[-/] ?|\.| ?\(0\) ?| )?"
    r"(?:\(\d{1,5}\)|\d+)){0,7}(?![\w@])(?![.,:]\d)",
    re.ASCII,
)
_SAYS_PHONE = re.compile(
    r"(?<![a-z])(?:tele?(?:phone|fono|fon|fone|fax)?|phones?|mobile|mobil|cell(?:ular|phone)?|handy|fax|whats ?app|"
    r"wechat|sms|"
    r"text(?: me)?(?: at)?|call(?:ing|s)?|dial(?:ling)?|ring|hotline|contact|reach (?:me|us|him|her|them)|portable|"
    r"t[ée]l[ée]phone|t[ée]l|m[óo]vil|celular|chiama(?:re)?|appel(?:ez|er)|ruf(?:e|en)?|anrufen|rufnummer|"
    r"(?:my|his|her|our|your|their|mi|su|tu|mon|son|meine?|ihre?|seine|mio|meu|minha) (?:\w{2,6} )?(?:number|"
    r"n[úu]mero|num[ée]ro|"
    r"nummer|numero)|"
    r"电话|手机号?码?|热线|座机|传真|联系方式|致电|拨打|来电|手机)\W{0,4}(?:(?:number|no|nummer|num[ée]ro|n[úu]mero|nr|号码|号|"
    r"at|on|is|under|me|us|moi|mich|es|ist|est|é|è|him|her|them|my|to|office|home|work|是|为|unter|au|al|en|(?:num|_?number))\W{0,3}){0,3}\Z",
    re.IGNORECASE,
)
_SAYS_OTHER = re.compile(
    r"(?<![a-z])(?:order|invoice|tracking|parcel|shipment|isbn|issn|doi|sku|upc|ean|imei|serial|ticket|case|reference|ref|article|"
    r"account|acct|a/c|acc|iban|customer|member|item|model|part|product|batch|lot|build|version|ver|release|page|pp|pin|code|zip|"
    r"postcode|patent|flight|room|row|seed|timestamp|epoch|id|uid|uuid|pmid|arxiv|barcode|year|date|population|size|"
    r"bytes|score|total|sum|value|price|qq|订单|单号|运单|快递|编号|流水|批号|版本|条码|账号|学号|工号|邮编|"
    r"bestell(?:ung|nummer)|rechnung(?:snummer)?|commande|pedido|factura)\W{0,3}(?:(?:number|no|nr|num|nummer|id|code|号码|"
    r"号|#|is|was|are|of|为|是|date)\W{0,3}){0,3}\Z",
    re.IGNORECASE,
)
_OPERAND_BEFORE = re.compile(r"(?:[=*^<>×÷√%(\[{,]|\d\s*[-+/])\s*\Z")
_OPERAND_AFTER = re.compile(r"\s*(?:[=*^<>×÷%]|[-+/]\s*\d)")
_COUNTRY_CODES = (  # E.164, as assigned
    "1 7 20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 63 64 65 66 81 82 84 "
    "86 90 91 92 93 94 95 98 211 212 213 216 218 220 221 222 223 224 225 226 227 228 229 230 231 232 233 234 235 236 "
    "237 238 239 240 241 242 243 244 245 246 248 249 250 251 252 253 254 255 256 257 258 260 261 262 263 264 265 266 "
    "267 268 269 290 291 297 298 299 350 351 352 353 354 355 356 357 358 359 370 371 372 373 374 375 376 377 378 380 "
    "381 382 383 385 386 387 389 420 421 423 500 501 502 503 504 505 506 507 508 509 590 591 592 593 594 595 596 597 "
    "598 599 670 672 673 674 675 676 677 678 679 680 681 682 683 685 686 687 688 689 690 691 692 800 850 852 853 855 "
    "856 870 880 886 888 960 961 962 963 964 965 966 967 968 970 971 972 973 974 975 976 977 992 993 994 995 996 "
    "998"
)
_CODES = frozenset(_COUNTRY_CODES.split())
_CN_MOBILE = re.compile(r"1(?:3\d|4[5-9]|5[0-35-9]|6[2567]|7[0-8]|8\d|9[0-35-9])\d{8}")
_CN_FIXED = re.compile(r"(?:0(?:10|2[0-57-9])\d{8}|0[3-9]\d{2}\d{7,8})")
_NANP = re.compile(r"1?[2-9](?!11)\d\d[2-9](?!11)\d\d\d{4}")
_AMERICAN = re.compile(r"(?:1[-. ])?(?:\([2-9]\d\d\) ?|[2-9]\d\d([-.]))\d{3}(?(1)\1|[-. ])\d{4}|123-456-7890")
_SEVEN_DIGITS = re.compile(r"\d(?:[ ()./+-]{0,3}\d){6}", re.ASCII)
_GROUPS = re.compile(r"\d+")


def is_phone(text: str, start: int, end: int) -> bool:
    """Whether the candidate at text[start:end] is a telephone number."""
    written, before = text[start:end], text[max(0, start - 40) : start]
    digits = "".join(_GROUPS.findall(written))
    if not 7 <= len(digits) <= 16 or len(set(digits)) < 3:
        return False
    said = bool(_SAYS_PHONE.search(before))
    if not said and (_SAYS_OTHER.search(before) or _is_operand(text, start, end)):
        return False
    if written.startswith(("+", "(+")) or (written.startswith("00") and len(digits) >= 11):
        return (said or not _is_term(written, before)) and _international(digits.removeprefix("00"))
    groups = _GROUPS.findall(written)
    return _national(digits, groups, written) or (said and _announced(digits, groups))


def phones(text: str) -> Iterator[tuple[int, int]]:
    """Where telephone numbers stand."""
    if not _SEVEN_DIGITS.search(text):
        return
    for match in CANDIDATE.finditer(text):
        if is_phone(text, *match.span()):
            yield match.span()


def says_other(text: str, start: int) -> bool:
    """Whether the words right before say that a number is an order, a version, an ISBN…"""
    return bool(_SAYS_OTHER.search(text[max(0, start - 40) : start]))


def normal(written: str) -> str:
    """What two spellings of one number share: its digits, without 00 and without China's 86."""
    digits = "".join(_GROUPS.findall(written)).removeprefix("00")
    return digits[2:] if len(digits) == 13 and digits.startswith("86") else digits


def _international(digits: str) -> bool:
    return 8 <= len(digits) <= 15 and any(digits[:length] in _CODES for length in (1, 2, 3))


def _national(digits: str, groups: list[str], written: str) -> bool:
    shape = tuple(len(group) for group in groups)
    bare = len(groups) == 1
    if _is_date(groups, shape) or _is_series(groups):
        return False
    mobile = digits.removeprefix("86") if len(digits) == 13 else digits
    if _CN_MOBILE.fullmatch(mobile) and shape in {(11,), (13,), (3, 4, 4), (2, 11), (2, 3, 4, 4), (3, 8), (3, 3, 5)}:
        return True
    if len(groups) > 1 and _CN_FIXED.fullmatch(digits) and shape[0] in (3, 4) and groups[0].startswith("0"):
        return True
    if shape in {(3, 3, 4), (3, 4, 3)} and groups[0] in ("400", "800"):
        return True
    if _NANP.fullmatch(digits) and shape in {(3, 3, 4), (1, 3, 3, 4), (3, 7)}:
        return "." not in written or shape != (3, 7)
    if _AMERICAN.fullmatch(written):  # 555-123-4567 is no number that exists, but what people write for one
        return True
    trunk = digits.startswith("0") and not digits.startswith("00") and len(groups[0]) >= 2
    return trunk and not bare and 9 <= len(digits) <= 12 and _european(shape, written)


def _european(shape: tuple[int, ...], written: str) -> bool:
    """Trunk 0: pairs as in France, area and number as in Germany, Britain, Italy or the Netherlands."""
    pairs = len(shape) >= 4 and set(shape[1:]) == {2}
    area = shape[0] in (2, 3, 4, 5) and shape[-1] >= 2 and max(shape[1:]) >= 3 and len(shape) <= 5
    if "." in written and not pairs:  # 01.2345.6789 is a numbering of something
        return area and len(shape) >= 3 and min(shape) >= 3
    return pairs or area


def _announced(digits: str, groups: list[str]) -> bool:
    return 7 <= len(digits) <= 15 and not _is_date(groups, tuple(len(group) for group in groups))


def _is_date(groups: list[str], shape: tuple[int, ...]) -> bool:
    if shape in {(4, 2, 2), (4, 1, 2), (4, 2, 1)}:
        return groups[0][:2] in ("19", "20") and int(groups[1]) <= 12
    if len(shape) == 3 and shape[2] == 4:
        return max(shape[:2]) <= 2 and max(int(groups[0]), int(groups[1])) <= 31
    return shape == (4, 4) and all(group[:2] in ("19", "20") for group in groups)  # 1998-2005


def _is_series(groups: list[str]) -> bool:
    """01 02 03 04 05: counting, not calling."""
    steps = {int(b) - int(a) for a, b in pairwise(groups)}
    return len(groups) >= 4 and len(steps) == 1


def _is_term(written: str, before: str) -> bool:
    """A sum's `472547338\\n+960397912423686`: a bare number with a sign, right behind another."""
    return written[1:].isdecimal() and bool(re.search(r"\d\s*\Z", before))


def _is_operand(text: str, start: int, end: int) -> bool:
    before, after = text[max(0, start - 8) : start], text[end : end + 4]
    bracketed = before.endswith(("(", "[", ",", "{")) or before[-2:] == ", "
    if bracketed and not re.fullmatch(r"\d+", text[start:end]):
        bracketed = False
        before = ""
    return bool(_OPERAND_AFTER.match(after)) or bool(_OPERAND_BEFORE.search(before) and not bracketed)
