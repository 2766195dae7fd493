"""YAML text to data with places: YAML 1.2 scalars, duplicates, aliases, tags, and never anything but RecipeError."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from luthier.contracts.errors import LuthierError, RecipeError
from luthier.recipe.document import dump, parse, read_document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1e-5", 1e-5), ("2E5", 2e5), ("1.", 1.0), (".5", 0.5), ("-1e+3", -1000.0), ("1.10", 1.1),
        ("012", 12), ("0o14", 12), ("0xff", 255), ("-7", -7), ("+7", 7),
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("no", "no"), ("y", "y"), ("22:22", "22:22"),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"), ('"012"', "012"), ("'true'", "true"), ("!!str 12", "12"), (".inf", float("inf")),
    ],
)  # fmt: skip
def test_scalars_are_read_by_yaml_1_2(text: str, value: object) -> None:
    read = parse(f"x: {text}", "r.yaml").data["x"]
    assert read == value
    assert type(read) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_reads_back(number: float) -> None:
    read = parse(f"x: {number!r}", "r.yaml").data["x"]
    assert read == number
    assert isinstance(read, float)


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=5), _PLAIN, max_size=4))
def test_what_dump_writes_reads_back_here_and_by_yaml_1_1(data: dict[str, object]) -> None:
    text = dump(data)
    assert parse(text, "r.yaml").data == data
    assert yaml.safe_load(text) == data


@pytest.mark.parametrize(
    "text", ["1e-4", "012", "on", "no", "1.10", "null", "22:22", "2026-01-01", "0E0", "a: b", "<<"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert parse(dump({"path": text}), "r.yaml").data == {"path": text}


@given(st.text(max_size=60))
def test_any_text_is_data_or_one_of_our_errors(text: str) -> None:
    try:
        line = f"r.yaml {parse(text, 'r.yaml').data}"
    except LuthierError as error:
        line = error.line()
    assert "r.yaml" in line


def test_places_are_lines_and_columns() -> None:
    document = parse("a: 1\nb:\n  c: [x, yy]\n", "r.yaml")
    assert document.where(("a",)) == "r.yaml:1:4"
    assert document.where(("b", "c"), key=True) == "r.yaml:3:3"
    assert document.where(("b", "c", 1)) == "r.yaml:3:10"
    assert document.where(("b", "absent", "deeper")) == "r.yaml:3:3"  # the nearest thing around it


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ["duplicate key `a`", "r.yaml:3:1", "r.yaml:1:1"]),
        ("a: {b: 1, b: 2}", ["duplicate key `b`", "r.yaml:1:11"]),
        ("a:\n\tb: 1", ["not YAML", "r.yaml:2:1", "spaces"]),
        ("a: [1, 2", ["not YAML", "r.yaml:1:9"]),
        ("a: !!python/object/apply:os.system [x]", ["tags are not read", "r.yaml:1:4"]),
        ("a: !env HOME", ["tags are not read", "!env"]),
        ("a: &x {b: 1}\nc:\n  <<: *x", ["merge keys", "r.yaml:3:3"]),
        ("a: &x [*x]", ["alias inside the value", "r.yaml:1:4"]),
        ("a: 1\n---\nb: 2", ["second document", "r.yaml:2:1"]),
        ("[1, 2]: 3", ["a key must be a word", "r.yaml:1:1"]),
        ("a: *nowhere", ["not YAML", "nowhere"]),
        ("a: " + "9" * 5000, ["too many digits", "r.yaml:1:4"]),
        ("[" * 5000, ["r.yaml"]),
        ("a: \x07", ["not allow", "r.yaml:1"]),
    ],
)
def test_bad_text_is_one_line_with_its_place(text: str, words: list[str]) -> None:
    with pytest.raises(LuthierError) as caught:
        parse(text, "r.yaml")
    line = caught.value.line()
    assert all(word in line for word in words), line
    assert "\n" not in line
    assert caught.value.exit_code == 2


def test_aliases_expand_under_a_cap() -> None:
    assert parse("a: &x [1, 2]\nb: *x", "r.yaml").data == {"a": [1, 2], "b": [1, 2]}
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)
    )
    with pytest.raises(RecipeError, match="aliases"):
        parse(bomb, "r.yaml")


def test_several_duplicates_come_together() -> None:
    with pytest.raises(LuthierError) as caught:
        parse("a: 1\na: 2\nb: {c: 1, c: 2}\n", "r.yaml")
    assert caught.value.line().count("duplicate key") == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("model: m\n")
    with pytest.raises(RecipeError, match="no such recipe file") as caught:
        read_document(str(tmp_path / "their.yaml"))
    assert "there.yaml" in caught.value.line()
    (tmp_path / "latin.yaml").write_bytes(b"model: m\n# caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin\.yaml:2"):
        read_document(str(tmp_path / "latin.yaml"))
    with pytest.raises(RecipeError, match="cannot read"):
        read_document(str(tmp_path))
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfmodel: m\n")
    assert read_document(str(tmp_path / "bom.yaml")).data == {"model": "m"}
