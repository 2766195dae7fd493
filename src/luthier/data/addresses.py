"""Addresses of the network: e-mail, IPv4, IPv6 and MAC, told from what only looks like them.

e-mail  local@domain.tld with a top level domain that exists (IANA), also `name [at] host [dot] org`; not `icon@2x.png`,
        not `x@w.mT` of a matrix product, not the `git@host:` of a repository
IPv4    four bytes without leading zeros; not a version (`v1.2.3.4`, `==1.2.3.4`, `1.2.3.4-rc1`, a number of a
        section), not a netmask, not the machine itself (127…, 0.0.0.0)
IPv6    what the standard library reads as one (RFC 4291), with enough of it that `a::b` or `x[1::2]` is none
MAC     six bytes with one kind of separator, or `001b.4411.3ab7`; not all zeros or ones, not part of a longer
        fingerprint
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

_COUNTRIES = (
    "ac ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz ca cc cd "
    "cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk fm fo fr ga gd ge "
    "gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir is it je jm jo jp ke kg kh "
    "ki km kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk ml mm mn mo mp mq mr ms mt mu mv mw "
    "mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pn pr ps pt pw py qa re ro rs ru rw sa sb "
    "sc sd se sg sh si sk sl sm sn so sr ss st su sv sx sy sz tc td tf tg th tj tk tl tm tn to tr tt tv tw tz ua ug uk "
    "us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw"
)
_GENERIC = (
    "com net org edu gov mil int arpa info biz name pro aero asia cat coop jobs mobi museum post tel travel app dev "
    "xyz "
    "online site tech store shop blog cloud email live life world club today news media agency company solutions "
    "services group team studio design digital page link space website host fun art wiki top vip work works berlin "
    "london paris nyc tokyo hamburg koeln wien bayern bank insurance health hospital school university academy "
    "institute foundation center international global systems software network finance capital care clinic dental law "
    "legal consulting engineering education photography gmbh ltd inc llc one plus zone run codes science example test "
    "local localhost internal lan corp home church music photos tools support help energy green land city community"
)
_TOP = frozenset((_COUNTRIES + " " + _GENERIC).split())
_L = "A-Za-z0-9À-ɏ"
_EMAIL = re.compile(
    rf"(?<![{_L}._%+-])(?P<name>[{_L}_](?:[{_L}._%+-]|'(?=[A-Za-z])){{0,63}})@"
    rf"(?:[{_L}][{_L}-]{{0,62}}\.){{1,6}}(?P<top>[A-Za-z]{{2,24}})(?![A-Za-z0-9_(\[]|\.[A-Za-z0-9]*[_(\[])"
)
_SPELLED = re.compile(
    rf"(?<![{_L}._%+-])[{_L}][{_L}._%+-]{{0,63}} ?[(\[{{<] ?at ?[)\]}}>] ?[{_L}][{_L}-]{{0,62}}"
    rf"(?:(?: ?[(\[{{<] ?dot ?[)\]}}>] ?|\.)[{_L}][{_L}-]{{0,62}}){{1,4}}",
    re.IGNORECASE,
)
_V4 = re.compile(
    r"(?<![\w.])(?<!\w-)(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)){3}"
    r"(?!\w|\.\w|[-+_](?:alpha|beta|rc|dev|post|snapshot|release|final|ga|stable|r\d|b\d|\d+\b(?!\.)))",
    re.IGNORECASE | re.ASCII,
)
_SAYS_VERSION = re.compile(
    r"(?<![a-z])(?:version|versions|ver|v|release|rev|revision|build|firmware|driver|update|upgraded?|patch|python|java|chrome|ios|"
    r"android|office|section|sec|clause|chapter|article|figure|table|paragraph|item|step|rule|package|library|sdk|api|"
    r"nuget|oid|版本|固件|章|节|条|版)\W{0,3}(?:(?:is|was|to|from|number|no|of|号|为|是|至|到)\W{0,3}){0,2}\Z|[A-Za-z]/\Z|"
    r"(?:==|>=|<=|~=|!=|[<>^~§])\s?[\"']?\Z",
    re.IGNORECASE,
)
_SAYS_IP = re.compile(
    r"(?<![a-z])(?:\bips?\b|ipv4|addr|address|host|server|dns|ping|ssh|gateway|router|proxy|subnet|client|remote|node|peer|"
    r"地址|服务器|主机|网关|登录)[^\n]{0,24}\Z",
    re.IGNORECASE,
)
_V6 = re.compile(
    r"(?<![\w:.])(?=[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{0,39}:)[0-9A-Fa-f:]{4,39}(?:(?<=:)\d{1,3}(?:\.\d{1,3}){3})?(?![\w:])",
    re.ASCII,
)
_MAC = re.compile(
    r"(?<![\w:-])(?:[0-9A-Fa-f]{2}([:-]))(?:[0-9A-Fa-f]{2}\1){4}[0-9A-Fa-f]{2}(?![\w]|[:-][0-9A-Fa-f])", re.ASCII
)
_DOTTED = re.compile(r"\d\.\d{1,3}\.\d")
_FAMOUS = frozenset(("8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"))
_BRACKETED_AT = re.compile(r"[(\[{<] ?at ?[)\]}>]", re.IGNORECASE)
_IN_LOGIN = re.compile(r"://[^\s/@]{1,100}:\Z")  # user:password@host, which credentials.py judges
_DOTTED_HEX = re.compile(r"\.[0-9A-Fa-f]{4}\.")
_DOTTED_MAC = re.compile(r"(?<![\w.])(?:[0-9A-Fa-f]{4}\.){2}[0-9A-Fa-f]{4}(?![\w]|\.\w)", re.ASCII)
_REPOSITORY = frozenset(("git", "hg", "svn"))


def emails(text: str) -> Iterator[tuple[int, int]]:
    """Where e-mail addresses stand."""
    if "@" in text:
        for match in _EMAIL.finditer(text):
            top = match["top"]
            written_one_way = top.islower() or top.isupper()
            repository = match["name"] in _REPOSITORY and text[match.end() : match.end() + 1] in (":", "/")
            if _IN_LOGIN.search(text[max(0, match.start() - 100) : match.start()]):
                continue
            if top.lower() in _TOP and written_one_way and not repository and ".." not in match["name"]:
                yield match.span()
    if _BRACKETED_AT.search(text):
        for match in _SPELLED.finditer(text):
            if re.split(r"\W+", match.group().rstrip(")]}> "))[-1].lower() in _TOP:
                yield match.span()


def ips(text: str, private: bool = True) -> Iterator[tuple[int, int]]:
    """Where IP addresses stand; `private`: those of local networks too."""
    if _DOTTED.search(text):
        for match in _V4.finditer(text):
            if _is_v4(text, *match.span(), private):
                yield match.span()
    if text.count(":") >= 2:
        for match in _V6.finditer(text):
            if _is_v6(match.group(), private):
                yield match.span()


def macs(text: str) -> Iterator[tuple[int, int]]:
    """Where hardware addresses stand."""
    if text.count(":") >= 5 or text.count("-") >= 5:
        for match in _MAC.finditer(text):
            if len(set(re.split("[:-]", match.group().lower()))) > 1:
                yield match.span()
    if _DOTTED_HEX.search(text):
        for match in _DOTTED_MAC.finditer(text):
            if re.search("[a-fA-F]", match.group()) and re.search(r"\d", match.group()):
                yield match.span()


def _is_v4(text: str, start: int, end: int, private: bool) -> bool:
    written, before = text[start:end], text[max(0, start - 40) : start]
    parts = [int(part) for part in written.split(".")]
    if parts[0] in (0, 127, 255) or (parts[0] >= 224 and parts[0] != 239) or (not private and _is_local(written)):
        return False
    said = bool(_SAYS_IP.search(before))
    if _SAYS_VERSION.search(before) and not (said and re.search(r"\bips?\b|addr|host|server|地址", before, re.I)):
        return False
    if before[-1:] == ":" and before[-2:-1].isalpha() and not said and parts[0] < 30 and max(parts) < 100:
        return False  # the tag of an image: nginx:1.25.3.1
    return max(parts) >= 20 or parts[0] == 10 or said or written in _FAMOUS


def _is_v6(written: str, private: bool) -> bool:
    try:
        address = ipaddress.IPv6Address(written)
    except ValueError:
        return False
    groups = [group for group in written.split(":") if group]
    digits = sum(len(group) for group in groups)
    enough = len(groups) == 8 or (digits >= 5 and len(groups) >= 2 and len(groups[0]) >= 3)
    bare = len(groups) == 2 and all(group.isdigit() for group in groups)
    return enough and not bare and not address.is_loopback and (private or not address.is_private)


def _is_local(written: str) -> bool:
    return ipaddress.IPv4Address(written).is_private
