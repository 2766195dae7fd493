"""A target opened for use: a run, an adapter or a model directory becomes weights, tokenizer, template and policy.

    run directory      resolved.yaml names the base and the template; adapter/ or model/ holds the result
    adapter directory  PEFT layout; luthier.json (or PEFT's own key) names the base, the tokenizer lies beside it
    model directory    Hugging Face layout

What was trained is what is used: the template, the added tokens and the mask policy of the run come with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from luthier.artifact.adapter import CONFIG, before_packing, load_adapter, read_adapter
from luthier.contracts.errors import ModelError, UsageError
from luthier.contracts.method import Method
from luthier.contracts.record import Chat, Completion, Source, Text
from luthier.data.encode import Encoder
from luthier.data.template import open_template
from luthier.engine.precision import resolve_device, resolve_precision
from luthier.models.decoder_site import positions_and_rows
from luthier.models.load import Loaded, load_model
from luthier.models.quantise import densify
from luthier.models.shapes import max_positions
from luthier.recipe.recipe import DataSection, ModelSection


@dataclass
class Opened:
    """What `luthier.load` gives: call `prompt_ids` and the sampling room, or the model itself."""

    target: Path
    loaded: Loaded
    encoder: Encoder
    method: Method | None = None  # None: a whole model
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    def prompt_ids(self, record: Chat | Completion | Text) -> list[int]:
        """The ids that inference feeds before the answer to a record."""
        if isinstance(record, Chat):
            return self.encoder.prompt_ids(record.messages, record.tools)
        return self.encoder.raw_prompt_ids(record.prompt if isinstance(record, Completion) else record.text)

    def refuse_reward_model(self) -> None:
        """UsageError where the target scores answers and so writes none."""
        if self.loaded.reads == "scores":
            raise UsageError(
                "the target is a reward model: it scores answers and writes none", where=str(self.target),
                remedy="rank pairs with it: luthier evaluate TARGET --on PAIRS",
            )  # fmt: skip

    def as_record(self, prompt: str, system: str | None, raw: bool) -> Chat | Text:
        """A prompt as the target expects it: a conversation where it has a chat template, else plain text."""
        source = Source("--prompt", 1)
        if raw or self.encoder.template is None:
            return Text(prompt, source)
        opening = [{"role": "system", "content": system}] if system else []
        return Chat([*opening, {"role": "user", "content": prompt}], source)


def storage_of(target: str | Path) -> str:
    """The storage format that an adapter's base was trained in; none for a dense base and for a whole model."""
    directory = _result_of(Path(target)) if _recipe_of(Path(target)) else Path(target)
    if not (directory / CONFIG).exists():
        return "none"
    return read_adapter(directory).base_format


def open_target(
    target: str | Path, *, base: str | None = None, data: dict[str, Any] | None = None, dense: bool = False
) -> Opened:
    """Open a run, an adapter or a model directory on this machine's device. ModelError where it is none.

    The base of an adapter is stored as it was in training, or with `dense` as numbers: those of its files, or what its
    files unpack to.
    """
    path = Path(target)
    recipe = _recipe_of(path)
    directory = _result_of(path) if recipe else path
    adapter = read_adapter(directory) if (directory / CONFIG).exists() else None
    said = dict((recipe or _recipe_of(directory.parent) or {}).get("model", {}))
    if adapter is None:
        section = ModelSection(path=str(directory), chat_template=None)
    else:
        found = base or adapter.base_path or said.get("path")
        if not found:
            raise ModelError("the adapter does not name its base", where=str(directory), remedy="pass --base MODEL")
        section = ModelSection(path=str(found), add_tokens=tuple(adapter.side.get("added_tokens", ())),
                               **({} if dense else adapter.base_storage))  # fmt: skip
    device = resolve_device("auto")
    try:
        reads = adapter.reads if adapter is not None else "saved"
        loaded = load_model(section, dtype=resolve_precision("auto", device).frozen, device=device, reads=reads,
                            before_packing=None if adapter is None else before_packing(adapter))  # fmt: skip
    except ModelError as error:
        if adapter is None or base is not None:
            raise
        what = f"the adapter's base does not load: {error.what}"
        raise ModelError(what, where=str(directory), value=section.path, remedy="pass --base MODEL") from error
    if dense:
        densify(loaded.model)
    notes: list[str] = []
    method = None
    if adapter is not None:
        method = load_adapter(directory, loaded.model, base_fingerprint=loaded.fingerprint, notes=notes)
        loaded.model.to(device)
    template = open_template(_template_text(directory), loaded.tokenizer)
    said_of_data = {**_data_of(recipe), **(data or {})}
    section_of_data = DataSection(**{"train": ({"path": "-"},), **said_of_data})  # type: ignore[arg-type]
    most = max_positions(loaded.model.config)
    most = None if most is None else most - positions_and_rows(loaded.model)[0]
    if most is not None and section_of_data.max_tokens > most:
        section_of_data = section_of_data.model_copy(update={"max_tokens": most})
    encoder = Encoder(loaded.tokenizer, template, section_of_data, loaded.generation_stop_ids)
    loaded.model.eval()
    return Opened(path, loaded, encoder, method, notes)


def _recipe_of(path: Path) -> dict[str, Any] | None:
    """The resolved recipe of a run directory, None where the path is none."""
    file = path / "resolved.yaml"
    if not file.is_file():
        return None
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    return data if isinstance(data, dict) else None


def _result_of(run: Path) -> Path:
    for name in ("adapter", "model"):
        if (run / name).is_dir():
            return run / name
    raise ModelError(
        "the run has no result yet", where=str(run), remedy="let it finish: luthier train RECIPE --resume auto"
    )


def _template_text(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _data_of(recipe: dict[str, Any] | None) -> dict[str, Any]:
    data = (recipe or {}).get("data", {})
    return {name: data[name] for name in ("mask", "injection") if name in data}
