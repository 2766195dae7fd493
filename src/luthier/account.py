"""What a run writes about itself in its directory, besides the engine's journal and checkpoints.

    begin   resolved.yaml, plan.json, env.json, data/ledger.json, data/rejects.jsonl, gate.json
    end     adapter/ or model/, loss.png, report.json, README.md

`begin` is called once no checkpoint has refused the recipe, and opens the gate; `end` is done again as a whole when a
killed run is resumed at its last step.
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import luthier
from luthier.artifact.adapter import save_adapter
from luthier.artifact.adapter_config import PEFT_TYPES
from luthier.artifact.card import CardFacts, card
from luthier.assembly import Assembled
from luthier.checked import gate_of
from luthier.disk.durable import replace_text
from luthier.disk.fault import fault
from luthier.engine.gate import GateFailure, run_gate
from luthier.engine.journal import summary
from luthier.engine.plot import draw_loss
from luthier.engine.resident import forget_peak, peak_bytes
from luthier.engine.task import Outcome
from luthier.engine.threads import machine
from luthier.models.load import save_tokenizer, save_whole
from luthier.models.quantise import format_of, start_of
from luthier.models.replace import sweep_beside
from luthier.planning import after, predicted
from luthier.recipe.document import dump


def begin(work: Assembled, directory: Path) -> None:
    """Only now, when no checkpoint refused this recipe, may the run's own account be written."""
    _write_beginning(work, directory)
    _pass_gate(work, directory)


def _pass_gate(work: Assembled, directory: Path) -> None:
    """The evidence is written whether the gate opens or not."""
    try:
        evidence = run_gate(gate_of(work))
    except GateFailure as failure:
        replace_text(directory / "gate.json", json.dumps(failure.evidence, indent=2) + "\n")
        raise
    replace_text(directory / "gate.json", json.dumps(evidence, indent=2) + "\n")
    forget_peak()


def _write_beginning(work: Assembled, directory: Path) -> None:
    ledger = work.prepared.ledger
    (directory / "data").mkdir(exist_ok=True)
    replace_text(directory / "resolved.yaml", dump(work.recipe.resolved()))
    replace_text(directory / "plan.json", json.dumps(predicted(work), indent=2) + "\n")
    replace_text(directory / "env.json", json.dumps(_environment(work), indent=2) + "\n")
    replace_text(directory / "data" / "ledger.json", json.dumps(ledger.to_json(), indent=2) + "\n")
    if ledger.rejects:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ledger.rejects]
        replace_text(directory / "data" / "rejects.jsonl", "".join(lines))


def _environment(work: Assembled) -> dict[str, Any]:
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    trunk, template, cuda = work.trunk, work.encoder.template, work.device.type == "cuda"
    return {
        "luthier": luthier.__version__, "python": platform.python_version(), "platform": platform.platform(),
        **{name: version(name) for name in packages}, **machine(), "device": str(work.device),
        "device_name": torch.cuda.get_device_name(work.device) if cuda else platform.processor(),
        "precision": work.precision.name, "path": trunk.path, "path_reason": trunk.reason,
        "kernel": trunk.facts.kernel, "last_layer": trunk.facts.last_layer, "head": trunk.head,
        "reference": type(work.reference).__name__ if work.reference else None,
        "template_date": template.now.isoformat() if template else None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def _lasting(base: str) -> str:
    """A base that is a directory here is named by its whole path, so that the adapter works from anywhere."""
    place = Path(base).expanduser()
    return os.path.abspath(place) if place.is_dir() else base


def end(work: Assembled, directory: Path, outcome: Outcome) -> dict[str, Any]:
    """Result, picture, report and card; done again as a whole when a killed run is resumed here."""
    loaded, recipe = work.loaded, work.recipe
    template = work.encoder.template.text if work.encoder.template else None
    result = directory / ("model" if work.method.trains_base else "adapter")
    sweep_beside(result)
    if work.method.trains_base:
        save_whole(loaded.model, loaded.tokenizer, template, result)
    else:
        save_adapter(
            result, work.method, loaded.model, base_path=_lasting(recipe.model.path),
            base_fingerprint=loaded.fingerprint, added_tokens=loaded.added,
        )  # fmt: skip
        save_tokenizer(loaded.tokenizer, template, result)
    fault("result.written")
    draw_loss(directory / "journal.jsonl", directory / "loss.png", title=directory.name)
    told = summary(directory / "journal.jsonl")
    planned = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    measured = peak_bytes() if work.device.type == "cpu" else told["peak_bytes"]
    report = {
        "run_dir": str(directory), **told, "eval_loss": outcome.eval_loss, "result_dir": str(result),
        "result_from": f"step {outcome.step}, {'the best' if outcome.is_best else 'the last'}",
        "mergeable": work.method.mergeable, "reads": loaded.reads, "notes": work.notes,
        "memory": after(planned, measured, work.device.type),
    }  # fmt: skip
    replace_text(directory / "report.json", json.dumps(report, indent=2) + "\n")
    facts = CardFacts(
        base=recipe.model.path, method=recipe.method["name"], objective=recipe.objective["name"],
        adapter=not work.method.trains_base, scores=loaded.reads == "scores",
        method_fields={k: v for k, v in recipe.method.items() if k != "name"},
        data=work.prepared.ledger.summary().splitlines(),
        results={name: report[name] for name in ("steps", "final_loss", "eval_loss", "tokens", "scored_tokens")},
        peft=work.method.peft_type in PEFT_TYPES, version=luthier.__version__,
        base_format=format_of(loaded.model), base_start=start_of(loaded.model),
        recipe=dump(recipe.resolved()),
    )  # fmt: skip
    replace_text(directory / "README.md", card(facts))
    return report
