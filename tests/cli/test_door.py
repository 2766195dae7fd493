"""`luthier`: help without heavy imports, one line and a code for every error, `--debug`, verbs that exist."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

import luthier
from luthier.cli import main as door
from luthier.contracts.errors import CheckpointError, NumericError, Stopped

SOURCE = Path(luthier.__file__).parents[1]
CLI = SOURCE / "luthier" / "cli"
HEAVY = ("torch", "pydantic", "rich", "yaml", "numpy", "transformers", "jinja2", "pyarrow", "matplotlib")


def program(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run(
        [sys.executable, "-m", "luthier", *words], capture_output=True, text=True, env=environment, cwd=cwd, timeout=240
    )


def imported_by(code: str) -> str:
    probe = f"import sys\n{code}\nprint([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment, timeout=240)
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["recipes", "ls"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert imported_by(f"from luthier.cli.main import main\nmain({words!r})") == "[]"


def test_a_recipe_error_never_imports_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: m\ndata: x\nepoch: 1\n")
    seen = imported_by(f"from luthier.cli.main import main\nmain(['config', {str(tmp_path / 'bad.yaml')!r}])")
    assert "torch" not in seen
    assert "numpy" not in seen


def test_every_file_is_a_verb_and_every_verb_a_command() -> None:
    beside = {"__init__", "main", "progress", "passes"}  # what verbs show while they work
    files = {path.stem for path in CLI.glob("*.py")} - beside
    files -= {name for name in files if name.partition("_")[0] in files and "_" in name}  # data_card: words of `data`
    assert files <= set(door.VERBS), "add the verb to VERBS in cli/main.py"
    context = click.Context(door.door, info_name="luthier")
    listed = door.door.list_commands(context)
    assert set(listed) == files
    for verb in listed:
        command = import_module(f"luthier.cli.{verb}").command
        assert isinstance(command, click.Command)
        assert command.help
        assert door.main([verb, "--help"]) == 0


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main([]) == 0
    shown = capsys.readouterr().out
    for verb in ("init", "recipes", "explain", "schema"):
        assert f"  {verb} " in shown
        assert door.VERBS[verb] in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(["--version"]) == 0
    assert capsys.readouterr().out == f"luthier {luthier.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scheme"], "usage: no such verb — saw scheme — did you mean `luthier schema`?"),
        (["zzz"], "usage: no such verb — saw zzz — see `luthier --help`"),
        (["schema", "--wat"], "usage: No such option '--wat'"),
        (["config"], "usage: Missing argument 'RECIPE' — luthier config — see `luthier config --help`"),
        (["recipes", "cp", "nothing"], "usage: no such shipped recipe — recipes — saw nothing"),
        (["config", "absent.yaml"], "recipe: no such recipe file — absent.yaml"),
    ],
)
def test_usage_errors_are_one_line_and_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(said)
    assert shown.err.count("\n") == 1


class _Raises(click.Command):
    def __init__(self, error: BaseException) -> None:
        super().__init__("schema", help="Raises.")
        self.error = error

    def invoke(self, ctx: click.Context) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (CheckpointError("the run differs", where="RUN", remedy="--fresh"), 4, "checkpoint: the run differs — RUN"),
        (NumericError("not finite"), 6, "numeric: not finite"),
        (Stopped("saved", signal=15), 143, "stopped: saved"),
        (KeyboardInterrupt(), 130, "stopped: interrupted"),
        (ZeroDivisionError("by\nzero"), 1, "internal: ZeroDivisionError: by zero — please report it; --debug"),
    ],
)
def test_every_error_has_its_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("luthier.cli.schema"), "command", _Raises(error))
    assert door.main(["schema"]) == code
    shown = capsys.readouterr().err.strip()
    assert shown.startswith(said)
    assert "Traceback" not in shown
    assert door.main(["schema", "--debug"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_the_traceback_goes_to_the_log_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ValueError("deep")
    error.run_log = tmp_path / "log.txt"  # type: ignore[attr-defined]
    monkeypatch.setattr(import_module("luthier.cli.schema"), "command", _Raises(error))
    assert door.main(["schema"]) == 1
    assert "ValueError: deep" in (tmp_path / "log.txt").read_text()
    assert str(tmp_path / "log.txt") in capsys.readouterr().err


def test_python_m_luthier_is_the_program(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: m\ndata: x\ntrain: {epoch: 1}\n")
    done = program("config", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "recipe: unknown field `train.epoch` — bad.yaml:3:9 — did you mean `epochs`?\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    line = f"{sys.executable} -m luthier schema | head -c 10 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=240)
    assert done.stderr == ""
    assert done.returncode in (0, 141)
