"""Secrets that programs carry: keys with a known beginning, signed tokens, private keys, logins inside addresses.

Each form is the issuer's own documented prefix and length, so a hash, a commit or a base64 picture is no key. `keys`
are whole matches; of a URL with a login only `user:password` is the secret. A login that is visibly a blank to be
filled in (`${USER}`, `<password>`, `{token}`) is none.

Leaves out secrets without a form (a password in prose): only a model can guess those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_FORMS = (
    r"sk-(?:proj-|svcacct-|admin-|or-v1-|ant-(?:api|admin|"
    r"oat)\d\d-)?(?=[\w-]{0,40}\d)[A-Za-z0-9_-]{20,200}",  # OpenAI, Anthropic
    r"[spr]k_(?:live|test)_[A-Za-z0-9]{16,110}|whsec_[A-Za-z0-9]{24,64}",  # Stripe
    r"gh[pousr]_[A-Za-z0-9]{30,251}|github_pat_[A-Za-z0-9_]{22,255}",  # GitHub
    r"gl(?:pat|ptt|dt|rt|cbt|soat)-[A-Za-z0-9_-]{20,64}",  # GitLab
    r"(?:AKIA|ASIA|ABIA|ACCA|AGPA|AIDA|AIPA|ANPA|ANVA|AROA)[A-Z0-9]{16}",  # AWS
    r"xox[abeoprs]-[A-Za-z0-9-]{10,250}|xapp-\d-[A-Za-z0-9-]{10,250}",  # Slack
    r"AIza[0-9A-Za-z_-]{30,45}|ya29\.[0-9A-Za-z_-]{20,250}|GOCSPX-[0-9A-Za-z_-]{28}",  # Google
    r"hf_[A-Za-z0-9]{30,64}|api_org_[A-Za-z0-9]{30,64}",  # Hugging Face
    r"npm_[A-Za-z0-9]{30,40}|pypi-AgE[A-Za-z0-9_-]{50,250}",  # registries of packages
    r"SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{32,64}|key-[0-9a-f]{32}",  # SendGrid, Mailgun
    r"(?:SK|AC)[0-9a-f]{32}",  # Twilio
    r"\d{8,10}:AA[A-Za-z0-9_-]{33}",  # Telegram
    r"[MNO][A-Za-z\d_-]{23,27}\.[A-Za-z\d_-]{6}\.[A-Za-z\d_-]{27,40}",  # Discord
    r"do[oprt]_v1_[a-f0-9]{64}|shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|"
    r"dckr_pat_[A-Za-z0-9_-]{27}",  # DigitalOcean, Shopify, Docker
    r"LTAI[A-Za-z0-9]{12,20}|AKID[A-Za-z0-9]{32}",  # Alibaba, Tencent
    r"gsk_[A-Za-z0-9]{40,60}|xai-[A-Za-z0-9]{60,90}|r8_[A-Za-z0-9]{37}|nvapi-[A-Za-z0-9_-]{60,70}|tvly-[A-Za-z0-9-]{20,40}",
    r"eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{10,1000}",  # JSON web token
)
KEY = re.compile(r"(?<![A-Za-z0-9_+/])(?:" + "|".join(_FORMS) + r")(?![A-Za-z0-9_+/-])")
PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<kind>(?:[A-Z0-9]{1,10} ){0,3}PRIVATE KEY(?: "
    r"BLOCK)?)-----[^-]{1,20000}(?:-(?!----)[^-]{0,20000}){0,50}"
    r"-----END (?P=kind)-----"
)
ANNOUNCED = re.compile(
    r"(?:aws_?secret(?:_?access)?_?key[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?P<aws>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+])"
    r"|Bearer\s(?P<bearer>(?=[\w.~+/-]{0,60}\d)[A-Za-z0-9_.~+/-]{20,1000}={0,2})"
    r"|AccountKey=(?P<azure>[A-Za-z0-9/+]{86}==)"
    r"|hooks\.slack\.com/services/(?P<slack>T[A-Z0-9]{8,12}/B[A-Z0-9]{8,12}/[A-Za-z0-9]{20,30}))",
    re.IGNORECASE,
)
LOGIN = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z][A-Za-z0-9+.-]{1,20}://(?P<login>[^\s:@/?#\"'<>{}$]{1,100}:[^\s:@/\"'<>{}$*]{1,200})@"
    r"(?=[\w\[.-])"
)
# What a text with a key in it must hold: looked for first, since the forms themselves are slow to try everywhere.
_BEGINNINGS = (
    "sk-", "k_live_", "k_test_", "whsec_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "glptt-",
    "gldt-", "glrt-", "glcbt-", "glsoat-", "AKIA", "ASIA", "ABIA", "ACCA", "AGPA", "AIDA", "AIPA", "ANPA", "ANVA",
    "AROA", "xox", "xapp-", "AIza", "ya29.", "GOCSPX-", "hf_", "api_org_", "npm_", "pypi-", "SG.", "key-", "SK", "AC",
    ":AA", "_v1_", "shpat_", "shpca_", "shppa_", "shpss_", "dckr_pat_", "LTAI", "AKID", "gsk_", "xai-", "r8_", "nvapi-",
    "tvly-", "eyJ",
)  # fmt: skip
_LONG_WORD = re.compile(r"[MNO][\w-]{23}")  # how a token of Discord begins, which has no prefix


def keys(text: str) -> Iterator[tuple[int, int]]:
    """Where keys stand."""
    if "PRIVATE KEY" in text:
        yield from (match.span() for match in PRIVATE_KEY.finditer(text))
    if any(beginning in text for beginning in _BEGINNINGS) or _LONG_WORD.search(text):
        yield from (match.span() for match in KEY.finditer(text))
    for word in ("earer ", "ws_", "WS_", "wsSecret", "AccountKey", "hooks.slack"):
        if word in text:
            for match in ANNOUNCED.finditer(text):
                yield match.span(match.lastgroup or 0)
            return


def logins(text: str) -> Iterator[tuple[int, int]]:
    """Where `user:password` stands inside an address."""
    if "://" in text and "@" in text:
        yield from (match.span("login") for match in LOGIN.finditer(text))
