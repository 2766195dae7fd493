"""The quickstart whole, in small: real training and scoring, cache, files, closing page, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from luthier.cli.quickstart import command
from luthier.contracts.errors import UsageError
from luthier.quickstart import cached, lesson, show

SHAPE = {
    "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 256,
}  # fmt: skip
SIZES = {"documents": 80, "train_rows": 60, "held_out_rows": 12, "max_new_tokens": 8, "shape": SHAPE}


@pytest.fixture
def sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {**cached.settings(), **SIZES}


def test_two_runs_share_one_base(tmp_path: Path, sizes: dict[str, object]) -> None:
    told: list[str] = []
    first = lesson.quickstart(tmp_path / "out", lesson.Listener(stage=told.append), sizes)
    weights = (first.base_dir / "model.safetensors").read_bytes()
    second = lesson.quickstart(tmp_path / "out", lesson.Listener(stage=told.append), sizes)
    assert [line[:4] for line in told] == ["1/4 ", "2/4 ", "3/4 ", "4/4 "] * 2
    assert "training a base" in told[0] and "cache" in told[4]
    assert (second.base_dir / "model.safetensors").read_bytes() == weights
    assert second.losses == first.losses  # same base, same rows, same seed
    assert first.base_score <= 0.2 and first.rows == 12
    for name in ("loss.png", "report.json", "gate.json", "data/ledger.json"):
        assert (first.run_dir / name).is_file(), name
    checked = json.loads((first.run_dir / "data" / "ledger.json").read_text())["held_out"]
    assert checked["item_where_pairs"]["seen_in_training"] == 0
    assert (first.adapter_dir / "adapter_model.safetensors").is_file()
    assert set(first.to_json()) == {"base_score", "tuned_score", "run_dir", "adapter_dir", "seconds"}
    page = "\n".join(show.lines(first))
    assert page.count("  note ") == 4 and str(first.adapter_dir) in page and "loss.png" in page
    assert len(list((tmp_path / "cache" / "luthier" / "quickstart").iterdir())) == 1
    assert first.base_dir == tmp_path / "out" / "base"  # usable when the cache is cleared


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path, sizes: dict[str, object]) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UsageError) as refused:
        lesson.quickstart(tmp_path, lesson.Listener(), sizes)
    assert "other files" in refused.value.line() and (tmp_path / "thesis.txt").exists()


def test_json_is_one_object_on_stdout(
    tmp_path: Path, sizes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "settings", lambda: sizes)
    made = CliRunner().invoke(command, ["--out", str(tmp_path / "out"), "--json", "--progress", "off"])
    assert made.exit_code == 0, made.output
    assert set(json.loads(made.stdout)) == set(lesson.JSON_KEYS)


def test_another_setting_is_another_cache(sizes: dict[str, object]) -> None:
    assert cached.folder(sizes) == cached.folder(dict(sizes)) != cached.folder({**sizes, "weights_seed": 5})


def test_sparkline_falls_with_the_loss() -> None:
    drawn = show.sparkline([2.0 / (i + 1) for i in range(100)])
    assert drawn[0] == "█" and drawn[-1] == "▁" and len(drawn) <= 50
