"""The sheet that people judge rows in: CSV for spreadsheets, or one HTML page; and the verdicts read back from it.

CSV is RFC 4180: a header, every field quoted, CRLF. A cell that a spreadsheet would take for a formula (it begins
with = + - @, a tab, a line end, or the wide forms of these) gets an apostrophe before it, as OWASP's page on CSV
injection asks; NUL, which no CSV holds, becomes U+FFFD; a cell is cut at 32,000 characters, about the most that
spreadsheets hold. These touch what is shown, never the built rows. `id` at the end names the row and its digest: it
must come back as it went.

The page is one file, no script or style from elsewhere (a content policy in it forbids them), rows as escaped text.
Keys: j and k move, g, b and u or 1 to 5 judge, c comments, s saves the CSV. What was judged stays in the browser until
it is saved.

Reading takes what spreadsheets write: a byte order mark, semicolons or tabs for commas, other line ends, no verdict.
"""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from luthier.contracts.errors import DataError, LuthierError, raise_all
from luthier.data.built_set import Row
from luthier.data.spot_check import Strata, shown
from luthier.data.verdicts import WORDS, Checked, Count, Verdicts

COLUMNS = ("file", "line", "origin", "prompt", "answer", "verdict", "comment", "id")
LONGEST, _CUT = 32_000, " … [cut here]"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_TOLD = 20  # errors of one sheet that are told at once
_PAGE = Path(__file__).with_name("check_page.html")


def sheet(rows: Sequence[Row]) -> str:
    """The CSV."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in rows:
        asked, said = shown(row.item.record)
        source = row.item.record.source
        writer.writerow(map(cell, (source.file, str(source.line), row.item.origin, asked, said, "", "", row.id)))
    return out.getvalue()


def cell(text: str) -> str:
    """A text as a cell that no program runs."""
    text = text.replace("\0", "\ufffd")
    if len(text) > LONGEST:
        text = text[: LONGEST - len(_CUT)] + _CUT
    return "'" + text if text.startswith(_FORMULA) else text


def page(rows: Sequence[Row], title: str) -> str:
    """The HTML page."""
    whole = _PAGE.read_text("utf-8")
    script = whole.partition("<script>")[2].partition("</script>")[0]
    style = whole.partition("<style>")[2].partition("</style>")[0]
    marks: Mapping[str, str] = {
        "{{script-hash}}": _hash(script), "{{style-hash}}": _hash(style), "{{title}}": html.escape(title),
        "{{count}}": str(len(rows)), "{{rows}}": "\n".join(_article(number, row) for number, row in enumerate(rows, 1)),
    }  # fmt: skip
    parts = whole
    for mark, value in marks.items():  # rows come last: nothing in them is taken for a mark
        parts = parts.replace(mark, value)
    return parts


def _article(number: int, row: Row) -> str:
    asked, said = (html.escape(text.replace("\0", "\ufffd")) for text in shown(row.item.record))
    source = row.item.record.source
    facts = {"file": source.file, "line": str(source.line), "origin": row.item.origin, "id": row.id}
    data = " ".join(f'data-{name}="{html.escape(value)}"' for name, value in facts.items())
    choices = "".join(
        f'<label><input type="radio" name="{row.id}" value="{word}"> {word}</label>'
        for word in ("good", "bad", "unsure")
    )
    return (
        f'<article tabindex="-1" {data}><h2>{number} <small>{html.escape(str(source))} · '
        f"{html.escape(row.item.origin)}</small></h2>\n"
        f"<h3>prompt</h3><pre>{asked}</pre>\n<h3>answer</h3><pre>{said}</pre>\n"
        f"<fieldset><legend>verdict</legend>{choices} "
        '<input class="comment" aria-label="comment" placeholder="comment"></fieldset></article>'
    )


def _hash(text: str) -> str:
    return base64.b64encode(sha256(text.encode()).digest()).decode()


# --------------------------------------------------------------------------------------------- reading


def entries(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a filled sheet with the line that each begins on; only its form is judged."""
    text = _decoded(path)
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header, begin = None, 1
    try:
        for fields in reader:
            if header is None:
                header = _header(fields, path)
            elif any(field.strip() for field in fields):
                yield begin, dict(zip(header, fields, strict=False))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"not a CSV sheet: {error}", where=f"{path}:{begin}", remedy="save it as CSV again") from error
    if header is None:
        raise DataError("an empty sheet", where=str(path), remedy="draw it again with `luthier data sample`")


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError("not UTF-8", where=f"{path}:{line}", remedy="save the sheet as CSV UTF-8") from error


def _header(fields: Sequence[str], path: Path) -> list[str]:
    names = [field.strip().lower() for field in fields]
    for needed in ("verdict", "id"):
        if needed not in names:
            remedy = "keep the columns of `luthier data sample`, fill in verdict and comment"
            raise DataError(
                f"the sheet has no column {needed}", where=f"{path}:1", value=", ".join(names), remedy=remedy
            )
    return names


def words(path: Path) -> tuple[dict[int, tuple[int, str, str, str]], int]:
    """Of a sheet: row of the set -> (line of the sheet, digest, verdict, comment), and how many rows have no verdict.

    Verdicts that are no word of ours, ids that are none, and rows judged twice are errors, told together.
    """
    found: dict[int, tuple[int, str, str, str]] = {}
    errors: list[LuthierError] = []
    empty = 0
    for line, entry in entries(path):
        where, word = f"{path}:{line}", entry.get("verdict", "").strip().lower()
        number, digest = _id(entry.get("id", "").strip())
        if number is None:
            errors.append(DataError("not the id of a row", where=where, value=entry.get("id", "")[:40],
                                    remedy="leave the column id as it was drawn"))  # fmt: skip
        elif not word:
            empty += 1
        elif word not in WORDS:
            errors.append(DataError("not a verdict", where=where, value=word[:40],
                                    remedy="good, bad, unsure, or 1 to 5"))  # fmt: skip
        elif number in found:
            errors.append(DataError("the same row is judged twice", where=where, value=f"also line {found[number][0]}",
                                    remedy="keep one of them"))  # fmt: skip
        else:
            found[number] = (line, digest, word, entry.get("comment", "").strip())
        if len(errors) == _TOLD:
            break
    raise_all(errors)
    return found, empty


def _id(text: str) -> tuple[int | None, str]:
    number, _, digest = text.removeprefix("r").partition("-")
    if text.startswith("r") and number.isdecimal() and number.isascii() and len(digest) == 16 and digest.isalnum():
        return int(number), digest
    return None, ""


def judged(read: Iterable[Row], by: Sequence[str], path: Path) -> Verdicts:
    """The verdicts of a sheet on a built set. A row that is not there, or another than was drawn, is an error."""
    said, empty = words(path)
    strata, checked, errors = Strata(tuple(by)), [], list[LuthierError]()
    for row in read:
        stratum = strata.see(row.item)
        if row.line not in said:
            continue
        line, digest, word, comment = said.pop(row.line)
        if digest != row.digest:
            errors.append(_foreign(path, line))
            continue
        note = row.item.notes.get("judge")
        judge = float(note) if isinstance(note, int | float) and not isinstance(note, bool) else None
        source = row.item.record.source
        place = (source.file, source.line)
        checked.append(Checked(row.line, stratum, word, WORDS[word], comment, place, judge))
    errors += [_foreign(path, line) for line, *_ in said.values()]
    raise_all(sorted(errors, key=lambda error: int(str(error.where).rpartition(":")[2]))[:_TOLD])
    made = Verdicts(tuple(by), {stratum: Count(rows) for stratum, rows in strata.rows.items()}, empty)
    for one in checked:
        made.add(one)
    return made


def _foreign(path: Path, line: int) -> DataError:
    remedy = "give the set that the sheet was drawn from, or draw the sheet again"
    return DataError("the row does not belong to this built set", where=f"{path}:{line}", remedy=remedy)
