"""What a run chooses so that it fits: microbatches first, then recomputation; refusals before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from luthier.cli.main import main
from luthier.contracts.errors import RecipeError, ResourceError
from luthier.fitting import room_of, settled
from luthier.planned import Planned
from luthier.planner import memory
from luthier.planner.load import assumed
from luthier.planner.memory import with_tokens
from planner.rig import SMALL, planned, recipe
from tiny import tiny, tiny_tokenizer

ROW = 256


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Planned:
    """8,192 tokens at once, rows of 256; the process itself takes nothing."""
    monkeypatch.setattr(memory, "LIBRARIES", 0)
    return replace(planned(SMALL, course=assumed(8192, 8192, ROW, 0.6), engine={"memory": "1GB"}), words=SMALL)


def chosen(plan: Planned, room: int) -> Planned:
    return settled(plan, room, ROW, partial(with_tokens, plan.course))


def needs(plan: Planned, tokens: int, recompute: int = 0) -> int:
    setting = replace(plan.setting, recompute_every=recompute)
    return replace(plan, setting=setting, course=with_tokens(plan.course, tokens)).memory.needs


def test_nothing_is_chosen_where_it_fits(plan: Planned) -> None:
    assert chosen(plan, plan.memory.needs) is plan


def test_the_largest_microbatch_that_fits_is_taken(plan: Planned) -> None:
    found = chosen(plan, needs(plan, 2048))
    assert found.recipe.train.microbatch_tokens == 2048 and found.recipe.engine.checkpoint_activations == "auto"
    assert found.memory.needs == needs(plan, 2048) and "microbatches of 2048 tokens; predicted" in found.notes[-1]
    assert chosen(plan, needs(plan, 2048) - 1).recipe.train.microbatch_tokens == 1024


def test_activations_are_recomputed_where_small_microbatches_do_not_do(plan: Planned) -> None:
    room = needs(plan, ROW) - 1
    found = chosen(plan, room)
    assert found.recipe.engine.checkpoint_activations is True and found.memory.needs <= room
    taken = found.recipe.train.microbatch_tokens
    assert needs(plan, 2 * taken, 1) > room >= needs(plan, taken, 1)
    assert "activations computed again" in found.notes[-1]


def test_what_the_recipe_says_is_not_changed(plan: Planned) -> None:
    said = recipe(train={"microbatch_tokens": 8192}, engine={"memory": "1GB"})
    found = chosen(replace(plan, recipe=said), needs(plan, 8192, 1))
    assert found.recipe.train.microbatch_tokens == 8192 and found.recipe.engine.checkpoint_activations is True
    fixed = said.model_copy(update={"engine": said.engine.model_copy(update={"checkpoint_activations": False})})
    with pytest.raises(ResourceError):
        chosen(replace(plan, recipe=fixed), needs(plan, 8192, 1))


def test_a_refusal_names_three_changes_and_what_they_save(plan: Planned) -> None:
    with pytest.raises(ResourceError) as caught:
        chosen(plan, 1 << 20)
    line = caught.value.line()
    assert line.count("saves") >= 2 and "model.quantization=nf4 saves" in line and "\n" not in line
    free = replace(plan, recipe=recipe())  # what is free on a GPU only warns
    assert chosen(free, 1 << 20).notes[-1] == line


def test_room() -> None:
    cpu = torch.device("cpu")
    assert room_of(recipe(), cpu) is None
    assert room_of(recipe(engine={"memory": "1.5GiB"}), cpu) == 3 << 29
    for wrong in ("", "GB", "0GB", "twelve", "-1GB", "12 parsecs"):
        with pytest.raises(RecipeError, match=r"`engine.memory` takes .*text such as 24GB"):
            recipe(engine={"memory": wrong})


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "LIBRARIES", 0)
    tiny().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{n} and", "completion": f" {n + 1}"} for n in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {tmp_path / 'model'}\ndata: {{train: {tmp_path / 'rows.jsonl'}, max_tokens: 64}}\n"
        "method: {name: lora, r: 8}\n"
        f"train: {{max_steps: 2, tokens_per_step: 1024}}\nengine: {{device: cpu}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    return file


def test_a_run_keeps_to_its_room_and_resumes_with_its_choice(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(written), "--dry-run", "--json"]) == 0
    free = json.loads(capsys.readouterr().out)["predicted_peak_bytes"]
    room = f"engine.memory={int(0.7 * free)}B"
    assert main(["plan", str(written), room, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["memory"]["peak_bytes"] <= 0.7 * free and told["fit"]["fits"]
    assert main(["train", str(written), room, "--progress", "off"]) == 0
    said = (run / "log.txt").read_text()
    assert "chosen to fit into" in said and "microbatches of" in said
    kept = json.loads((run / "plan.json").read_text())
    assert kept["predicted_peak_bytes"] == told["memory"]["peak_bytes"]
    capsys.readouterr()
    more = ["train.max_steps=4", "train.schedule=constant", "--progress", "off"]
    first = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert main(["train", str(written), "--resume", str(run / "checkpoint-2"), *more]) == 0
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert len(lines) > len(first) and not any("chosen to fit" in str(line) for line in lines[len(first) :])
    states = [json.loads((path / "state.json").read_text()) for path in sorted(run.glob("checkpoint-*"))]
    sizes = {str(state).split("'microbatch_tokens': ")[1].split(",")[0] for state in states}
    assert len(sizes) == 1


def test_what_does_not_fit_is_refused_before_the_weights(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.write_bytes(b"not weights")
    assert main(["train", str(written), "engine.memory=10kB", "--progress", "off"]) == 5
    said = capsys.readouterr().err
    assert said.startswith("resources: this training is predicted to need") and "saves" in said
    assert said.strip().count("\n") == 0
