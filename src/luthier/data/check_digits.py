"""Check digits: what tells a card, an account or an identity number from any other run of digits.

    luhn        ISO/IEC 7812-1: from the right, every second digit doubled, digit sums add to 0 mod 10
    mod97       ISO 13616 (IBAN): first four characters moved behind, letters as 10..35, the number is 1 mod 97
    resident    GB 11643 (China): weights 2^(17-i) mod 11, the last character X stands for 10; and a real date
    base58      Bitcoin's Base58Check: the last 4 bytes are the double SHA-256 of the others
    bech32      BIP 173 / 350: the polymod of prefix and data is 1 (segwit 0) or 0x2bc830a3 (taproot)

Plain functions of one string without separators. What a number of the right form but wrong digit was meant to be is
not guessed: it is no hit.
"""

from __future__ import annotations

import datetime
import hashlib
import re

# Issuer ranges and their lengths (ISO/IEC 7812 registrations that are in use).
_ISSUERS = (
    (re.compile(r"4"), (13, 16, 19)),  # Visa
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),  # Mastercard
    (re.compile(r"3[47]"), (15,)),  # American Express
    (re.compile(r"6011|65|64[4-9]"), (16, 17, 18, 19)),  # Discover
    (re.compile(r"35(?:2[89]|[3-8])"), (16, 17, 18, 19)),  # JCB
    (re.compile(r"30[0-5]|3[689]"), (14, 16)),  # Diners
    (re.compile(r"62"), (16, 17, 18, 19)),  # UnionPay
    (re.compile(r"5018|5020|5038|5893|6304|6759|676[1-3]"), (16, 17, 18, 19)),  # Maestro
    (re.compile(r"220[0-4]"), (16,)),  # Mir
)
# Length of an IBAN by country (SWIFT registry).
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15,
    "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19,
    "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip
_PROVINCES = frozenset(
    str(region * 10 + number)
    for region, numbers in ((1, 5), (2, 3), (3, 7), (4, 6), (5, 4), (6, 5))
    for number in range(0 if region == 5 else 1, numbers + 1)
) | {"71", "81", "82", "83"}
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"


def luhn(digits: str) -> bool:
    """Whether the digits add up."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(int(digit) for digit in digits[-1::-2])) % 10 == 0


def card(digits: str) -> bool:
    """A payment card: an issuer's first digits and length, and Luhn; not one digit over and over."""
    issued = any(start.match(digits) and len(digits) in lengths for start, lengths in _ISSUERS)
    return issued and luhn(digits) and len(set(digits)) > 1


def mod97(iban: str) -> bool:
    """An IBAN in capitals without spaces: the country's length, and 1 mod 97."""
    if (
        IBAN_LENGTHS.get(iban[:2]) != len(iban)
        or not iban.isalnum()
        or not iban[2:4].isdigit()
        or set(iban[4:]) == {"0"}
    ):
        return False
    return int("".join(str(int(letter, 36)) for letter in iban[4:] + iban[:4])) % 97 == 1


def resident(number: str) -> bool:
    """A Chinese resident identity number of 18 characters."""
    if number[:2] not in _PROVINCES or not _is_date(number[6:14]):
        return False
    total = sum(int(digit) * (2 ** (17 - i) % 11) for i, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


def resident_of_15(number: str) -> bool:
    """The form before 1999, without a check digit: province and date only."""
    return number[:2] in _PROVINCES and _is_date("19" + number[6:12])


def social_security(area: str, group: str, serial: str) -> bool:
    """A US social security number by the areas that are issued (never 000, 666, 9xx; group 00; serial 0000)."""
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def base58(address: str) -> bool:
    """A Bitcoin address of the old forms (1…, 3…)."""
    number = 0
    for letter in address:
        if letter not in _BASE58:
            return False
        number = number * 58 + _BASE58.index(letter)
    if number >= 1 << 200:
        return False
    raw = number.to_bytes(25, "big")
    return hashlib.sha256(hashlib.sha256(raw[:21]).digest()).digest()[:4] == raw[21:]


def bech32(address: str) -> bool:
    """A Bitcoin address of the segwit forms (bc1…)."""
    prefix, _, data = address.lower().rpartition("1")
    if not prefix or any(letter not in _BECH32 for letter in data):
        return False
    values = [ord(c) >> 5 for c in prefix] + [0] + [ord(c) & 31 for c in prefix] + [_BECH32.index(c) for c in data]
    check = 1
    for value in values:
        top, check = check >> 25, (check & 0x1FFFFFF) << 5 ^ value
        for i, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= generator if top >> i & 1 else 0
    return check in (1, 0x2BC830A3)


def _is_date(digits: str) -> bool:
    try:
        born = datetime.date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return False
    return 1850 <= born.year <= 2100
