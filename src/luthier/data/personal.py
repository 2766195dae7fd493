"""Personal data and secrets in a text: where they stand, by kinds, each with its own proof (D17).

    hits(text, kinds) -> [Hit(kind, start, end, normal)]     in order, none over another

A text is read with full-width digits and letters as plain ones (one character for one, so places agree). Of two kinds
that claim one place the one with the stronger proof has it: a private key before a login, a login before a key, then
e-mail, account, card, identity, security number, MAC, IP, wallet, and telephone last. `normal` is what two spellings of
one value share, so that both get one placeholder.

Rules only: names and postal addresses need a model and are left out. Linear: every pattern is bounded.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from luthier.data import check_digits
from luthier.data.addresses import emails, ips, macs
from luthier.data.credentials import keys, logins
from luthier.data.phones import normal as phone_normal
from luthier.data.phones import phones, says_other

Span = tuple[int, int]
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_PLAIN |= {0x3000: 0x20, 0xA0: 0x20, 0x2007: 0x20, 0x202F: 0x20} | dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013), 0x2D)
_CARD = re.compile(
    r"(?<![0-9A-Za-z_])(?<!\d[.,-])(?:(?P<solid>\d{13,19})|(?P<four>\d{4}(?P<s>[ -])\d{4}(?P=s)\d{4}(?P=s)\d{4})"
    r"(?P<more>(?P=s)\d{1,3}(?![ -]?\d))?|(?P<amex>\d{4}(?P<t>[ -])\d{6}(?P=t)\d{4,5}))(?![0-9A-Za-z_]|[.,]\d)"
)
_IBAN = re.compile(r"(?<![0-9A-Za-z])[A-Z]{2}\d{2}(?:[ -]?[0-9A-Z]{1,4}){2,9}")
_RESIDENT = re.compile(
    r"(?<![0-9A-Za-z_.])[1-9]\d{16}[0-9Xx](?![0-9A-Za-z_])|身份证[号码]{0,2}[:：\s是为]{0,3}(?P<old>[1-9]\d{14})(?!\d)"
)
_SSN = re.compile(r"(?<![\w-])(?<!\w\.)(\d{3})([- ]?)(\d{2})\2(\d{4})(?![\w-])(?!\.\d)", re.ASCII)
_SAYS_SSN = re.compile(
    r"(?:ssn|social[ -]security|\bsocial)\W{0,3}(?:(?:number|no|num|is|was|card|#)\W{0,3}){0,3}\Z", re.IGNORECASE
)
_SAYS_CARD = re.compile(r"(?:card|visa|karte|carte|tarjeta|卡)[^\d\n]{0,24}\Z", re.IGNORECASE)
_BITCOIN = re.compile(r"(?<![0-9A-Za-z])(?:[13][1-9A-HJ-NP-Za-km-z]{25,34}|bc1[02-9ac-hj-np-z]{11,71})(?![0-9A-Za-z])")
_ETHER = re.compile(r"(?<![0-9A-Za-z])0x[0-9a-fA-F]{40}(?![0-9A-Za-z])")
_NINE_DIGITS = re.compile(r"\d(?:[ -]?\d){8}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Hit:
    """One value of a kind at text[start:end]."""

    kind: str
    start: int
    end: int
    normal: str


def _cards(text: str) -> Iterator[Span]:
    for match in _CARD.finditer(text):
        start, end = match.span()
        digits = _digits(match.group())
        if match["four"] and not (match["more"] and check_digits.card(digits)):
            end = match.end("four")
            digits = _digits(match["four"])
        grouped = match["solid"] is None
        announced = len(digits) > 13 or _SAYS_CARD.search(text[max(0, start - 40) : start])
        if check_digits.card(digits) and announced and (grouped or not says_other(text, start)):
            yield start, end


def _ibans(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        written = match.group()
        length, seen = check_digits.IBAN_LENGTHS.get(written[:2], 0), 0
        for at, letter in enumerate(written):
            seen += letter.isalnum()
            if seen == length:
                after = text[match.start() + at + 1 : match.start() + at + 2]
                if check_digits.mod97(re.sub("[ -]", "", written[: at + 1])) and not after.isalnum():
                    yield match.start(), match.start() + at + 1
                break


def _residents(text: str) -> Iterator[Span]:
    for match in _RESIDENT.finditer(text):
        if match["old"]:
            if check_digits.resident_of_15(match["old"]):
                yield match.span("old")
        elif check_digits.resident(match.group()):
            yield match.span()


def _social_security(text: str) -> Iterator[Span]:
    for match in _SSN.finditer(text):
        area, separator, group, serial = match.groups()
        said = bool(_SAYS_SSN.search(text[max(0, match.start() - 40) : match.start()]))
        dashed = separator == "-" and not says_other(text, match.start())
        if check_digits.social_security(area, group, serial) and (said or dashed):
            yield match.span()


def _wallets(text: str) -> Iterator[Span]:
    for match in _BITCOIN.finditer(text):
        proof = check_digits.bech32 if match.group().startswith("bc1") else check_digits.base58
        if proof(match.group()):
            yield match.span()
    yield from (match.span() for match in _ETHER.finditer(text))


def _public_ips(text: str) -> Iterator[Span]:
    return ips(text, private=False)


# The kinds, strongest proof first: that order settles who has a place that two claim.
FINDERS: dict[str, Callable[[str], Iterator[Span]]] = {
    "login": logins, "key": keys, "email": emails, "iban": _ibans, "card": _cards, "cn_id": _residents,
    "ssn": _social_security, "mac": macs, "ip": ips, "wallet": _wallets, "phone": phones,
}  # fmt: skip
_NEED_DIGITS = frozenset(("card", "cn_id", "ssn"))


def hits(text: str, kinds: Sequence[str], *, private_ips: bool = True) -> list[Hit]:
    """What is found of these kinds, in order, none over another."""
    plain = text if text.isascii() else text.translate(_PLAIN)
    digits = bool(_NINE_DIGITS.search(plain))
    taken: list[Hit] = []
    for kind, find in FINDERS.items():
        if kind not in kinds or (kind in _NEED_DIGITS and not digits):
            continue
        finder = _public_ips if kind == "ip" and not private_ips else find
        for start, end in finder(plain):
            if all(end <= hit.start or hit.end <= start for hit in taken):
                taken.append(Hit(kind, start, end, normal(kind, plain[start:end])))
    return sorted(taken, key=lambda hit: hit.start)


def normal(kind: str, written: str) -> str:
    """What two spellings of one value share."""
    if kind == "phone":
        return phone_normal(written)
    if kind in ("card", "ssn"):
        return _digits(written)
    if kind in ("iban", "cn_id"):
        return re.sub("[ -]", "", written).upper()
    if kind == "mac":
        return re.sub("[:.-]", "", written.lower())
    if kind == "email":
        return re.sub(r" ?[(\[{<] ?(at|dot) ?[)\]}>] ?", lambda m: "@" if m[1].lower() == "at" else ".", written,
                      flags=re.IGNORECASE).casefold()  # fmt: skip
    if kind == "ip":
        return str(ipaddress.ip_address(written))
    return written


def _digits(written: str) -> str:
    return re.sub(r"\D", "", written)
