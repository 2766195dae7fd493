"""Adapters on disk, in PEFT's layout: `save_adapter` and its inverse `load_adapter`.

    adapter_config.json         PEFT's keys only, so that PEFT, vLLM and llama.cpp read it
    adapter_model.safetensors   PEFT's names; token rows of added tokens beside the method's tensors
    luthier.json                ours: method, its fields that PEFT has no key for, path and fingerprint of the base

Loading trusts nothing: the config passes an allow-list (adapter_config.py), the file its caps (tensor_file.py),
a pickle is refused, a base with another fingerprint is refused naming both, and every tensor must find its place.
A regex of the file is never run: the targets are the modules that the tensors name. On any error the model is as
it was. Whole models (`method: full`) are saved by models/load.py.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from luthier.artifact.adapter_config import check_config, read_json
from luthier.artifact.tensor_file import read_tensors
from luthier.contracts.errors import LuthierError, ModelError, RecipeError
from luthier.contracts.method import Method
from luthier.models import peft_names, token_rows
from luthier.models.quantise import FORMATS, format_of, is_double, packed_linears, start_of
from luthier.models.replace import replace_directory
from luthier.models.score_head import PEFT_HEADS, SCORES, score_head
from luthier.models.sites import detach, locate
from luthier.recipe import resolve

CONFIG, TENSORS, SIDE = "adapter_config.json", "adapter_model.safetensors", "luthier.json"
_FORMAT = 1


@dataclass(frozen=True)
class AdapterFile:
    """A directory that passed every check that needs no model."""

    directory: Path
    config: dict[str, Any]
    side: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]

    @property
    def base_path(self) -> str | None:
        return self.side.get("base", {}).get("path") or self.config.get("base_model_name_or_path")

    @property
    def base_format(self) -> str:
        """The format that the base was in."""
        return str(self.side.get("base", {}).get("quantization", "none"))

    @property
    def base_storage(self) -> dict[str, Any]:
        """The fields of `model` for the format that the base was in, where it was in one that a recipe asks for."""
        names = ("quantization", "double_quantization") if self.base_format in FORMATS else ()
        return {name: self.side["base"][name] for name in names if name in self.side.get("base", {})}

    @property
    def base_start(self) -> str:
        """The start that is part of the packed base that it was trained on (models/packed_starts.py), or empty."""
        return str(self.side.get("base", {}).get("start") or "")

    @property
    def reads(self) -> str:
        """`scores` where it makes a reward model of its base, else `logprobs`."""
        return "scores" if self.config.get("task_type") == SCORES else "logprobs"

    @property
    def base_fingerprint(self) -> str | None:
        return self.side.get("base", {}).get("fingerprint")


def save_adapter(
    directory: str | Path, method: Method, model: nn.Module, *, base_path: str, base_fingerprint: str | None = None,
    added_tokens: Mapping[str, int] | None = None,
) -> Path:  # fmt: skip
    """Write the adapter, with the token rows on the model, atomically; one already there is replaced as a whole."""
    directory = Path(directory)
    if method.trains_base:
        raise RecipeError(f"{type(method).__name__} trains the base: its result is a whole model", where="method")
    config = method.config(model)
    trained_rows = token_rows.row_config(model)
    whole = {
        **config, "auto_mapping": None, "base_model_name_or_path": base_path, "inference_mode": True,
        "peft_version": None, "revision": None,
        **({} if trained_rows is None else {token_rows.CONFIG_KEY: trained_rows}),
    }  # fmt: skip
    own = {name: value for name, value in _plain(asdict(method)).items() if name not in config}  # type: ignore[call-overload]
    stored = {} if (kind := format_of(model)) == "none" else {
        "quantization": kind, "double_quantization": is_double(model),
        **({"start": started} if (started := start_of(model)) else {}),
    }  # fmt: skip
    side = {
        "format": _FORMAT, "method": type(method).__module__.rpartition(".")[2], "fields": own,
        "base": {"path": base_path, "fingerprint": base_fingerprint, **stored},
        "added_tokens": dict(added_tokens or {}),
    }  # fmt: skip
    tensors = {**method.tensors(model), **_cpu(token_rows.row_tensors(model))}
    with replace_directory(directory) as fresh:
        for name, value in ((CONFIG, whole), (SIDE, side)):
            (fresh / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, fresh / TENSORS, metadata={"format": "pt"})
    return directory


def read_adapter(directory: str | Path) -> AdapterFile:
    """Everything that can be known and checked without a model."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelError("no such adapter directory", where=str(directory))
    if not (directory / TENSORS).is_file():
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        raise ModelError(
            f"{pickles[0]} is a pickle, which can run code" if pickles else f"{TENSORS} is missing",
            where=str(directory), remedy="save the adapter as safetensors" if pickles else "is this a whole model?",
        )  # fmt: skip
    side = read_json(directory / SIDE) if (directory / SIDE).exists() else {}
    _check_side(side, str(directory / SIDE))
    given = read_json(directory / CONFIG)
    more = _more_keys(side.get("method"), given.get("peft_type"))
    config, notes = check_config({**given, **side.get("fields", {})}, str(directory / CONFIG), more)
    return AdapterFile(directory, config, side, read_tensors(directory / TENSORS), tuple(notes))


def load_adapter(
    directory: str | Path, model: nn.Module, *, base_fingerprint: str | None = None,
    notes: list[str] | None = None,
) -> Method:  # fmt: skip
    """Attach the adapter of a directory to a bare base. Notes go to `notes`, or out as warnings."""
    file = read_adapter(directory)
    if base_fingerprint and file.base_fingerprint not in (None, base_fingerprint):
        raise ModelError(
            f"the adapter was made for another base ({file.base_path})", where=str(directory),
            value=f"{file.base_fingerprint} in the adapter, {base_fingerprint} loaded",
            remedy="load its own base",
        )  # fmt: skip
    _check_head(file, model)
    _check_start(file, model)
    method = _method_of(file)
    for note in file.notes:
        notes.append(note) if notes is not None else warnings.warn(note, stacklevel=2)
    try:
        method.attach(model)
        own, rows = _split(file.tensors)
        _load_rows(model, file, rows)
        method.load(model, _without_base_copies(model, own))
    except BaseException:
        detach(model)
        raise
    return method


def _check_head(file: AdapterFile, model: nn.Module) -> None:
    """A reward adapter wants a model with a score head, every other adapter one without."""
    has = "logprobs" if score_head(model) is None else "scores"
    if "task_type" in file.config and file.reads != has:
        what = "a reward model's (SEQ_CLS), and the base was loaded as a language model"
        other = "a language model's, and the base was loaded as a reward model"
        raise ModelError(f"the adapter is {what if file.reads == 'scores' else other}", where=str(file.directory))


def before_packing(file: AdapterFile) -> Callable[[nn.Module], Any] | None:
    """For `load_model`: the start that is part of this adapter's base, from its own tensors; None without one."""
    if not (start := file.base_start):
        return None
    method = _method_of(file)
    return lambda model: method.before_packing(model, start, file.tensors)


def _check_start(file: AdapterFile, model: nn.Module) -> None:
    """A packed base must carry this adapter's start, or none; on a dense base the adapter is the change since it."""
    there = {path: module for path, module in packed_linears(model).items() if module.start}
    if not there and (not file.base_start or format_of(model) == "none"):
        return
    pairs = {path: file.tensors.get(f"{peft_names.PREFIX}{path}.lora_A.weight") for path in there}
    same = all(
        a_RD is not None and module.lift_A is not None
        and torch.equal(a_RD[len(a_RD) // 2 :].to(module.lift_A), module.lift_A)
        for module, a_RD in zip(there.values(), pairs.values(), strict=True)
    )  # fmt: skip
    if not (there and same and file.base_start):
        raise ModelError(
            f"the adapter belongs to a base that was packed after its start ({file.base_start or 'none'}) was taken "
            "off, and this base was not", where=str(file.directory), value=start_of(model) or "none",
            remedy="open the adapter by its own path (luthier.load), or load the base dense",
        )  # fmt: skip


def _method_of(file: AdapterFile) -> Method:
    """The method of the side file, else the first whose `peft_type` and `from_config` accept the config."""
    kind, name = file.config["peft_type"], file.side.get("method")
    known = resolve.names("methods")
    named = [name] if name else [m for m in [kind.lower()] if m in known] + [m for m in known if m != kind.lower()]
    refusals: list[LuthierError] = []
    for candidate in named:
        if candidate not in known:
            raise ModelError("the adapter's method is not one of ours", where=str(file.directory), value=candidate)
        loaded = resolve.load("methods", candidate)
        if loaded.peft_type != kind:
            continue
        try:
            return _explicit(loaded.from_config(file.config), file)
        except RecipeError as error:
            refusals.append(error)
    if refusals:
        raise ModelError(
            refusals[0].what, where=str(file.directory / CONFIG), value=refusals[0].value, remedy=refusals[0].remedy
        )
    raise ModelError("no method here reads this type of adapter", where=str(file.directory), value=kind)


def _explicit(method: Method, file: AdapterFile) -> Method:
    """Where the file selects by regex (or a shorthand), the modules that its tensors name instead."""
    given: Any = method
    if not any(isinstance(getattr(method, name, None), str) for name in ("target_modules", "exclude_modules")):
        return method
    own, _ = _split(file.tensors)
    own = {name: tensor for name, tensor in own.items() if name.startswith(peft_names.PREFIX)}
    names = [name for name in own if not name.endswith((".bias", ".base_layer.weight"))]
    saved: Sequence[str] = getattr(method, "modules_to_save", None) or ()
    saved = (*saved, *PEFT_HEADS) if file.reads == "scores" else saved
    paths = {peft_names.module_of(name) for name in names}
    targets = tuple(sorted(path for path in paths if not any(_within(path, name) for name in saved)))
    return replace(given, target_modules=targets, exclude_modules=None)


def _within(path: str, saved: str) -> bool:
    """Copied whole: the module itself (by the end of its path) or one inside it."""
    return path.endswith(saved) or re.match(rf"(^|.*\.){saved}($|\..*)", path) is not None


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    rows = {name: tensor for name, tensor in tensors.items() if name.endswith(token_rows.SUFFIX)}
    return {name: tensor for name, tensor in tensors.items() if name not in rows}, rows


def _load_rows(model: nn.Module, file: AdapterFile, rows: Mapping[str, Tensor]) -> None:
    value = file.config.get(token_rows.CONFIG_KEY)
    if value is None:
        if rows:
            raise ModelError("token rows without trainable_token_indices", where=str(file.directory))
        return
    untied_head_trains = len(rows) > 1
    token_rows.attach_rows(model, token_rows.ids_of_config(value), head=untied_head_trains)
    token_rows.load_rows(model, rows)


def _without_base_copies(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT adds whole copies of a targeted or resized embedding: they must be the base's, then they are dropped."""
    kept: dict[str, Tensor] = {}
    expected = peft_names.live(model)
    for name, tensor in tensors.items():
        if name in expected or not name.endswith(".weight") or ".lora_" in name:
            kept[name] = tensor
            continue
        try:
            weight: Any = model.get_submodule(locate(model, peft_names.module_of(name))).weight
        except ModelError:
            kept[name] = tensor
            continue
        if weight.shape != tensor.shape or not bool((weight == tensor.to(weight)).all()):
            raise ModelError(
                "the adapter carries a copy of a base matrix that is not this base's", where=name,
                value=f"{tuple(tensor.shape)} against {tuple(weight.shape)}",
                remedy="load it on the base it was trained on (resized vocabulary included)",
            )  # fmt: skip
    return kept


def _more_keys(name: Any, kind: Any) -> Mapping[str, Any]:
    """Config keys that methods add to the allow-list (`config_keys`): the named method, or all of a type."""
    known = resolve.names("methods")
    if name:
        return resolve.load("methods", name).config_keys if name in known else {}
    classes = [resolve.load("methods", each) for each in known]
    return {key: check for each in classes if each.peft_type == kind for key, check in each.config_keys.items()}


def _check_side(side: Mapping[str, Any], where: str) -> None:
    base = side.get("base", {})
    good = isinstance(side.get("method", ""), str) and isinstance(side.get("fields", {}), dict)
    added = side.get("added_tokens", {})
    good = good and isinstance(added, dict) and all(isinstance(i, int) for i in added.values())
    good = (
        good and isinstance(base, dict) and all(isinstance(value, (str, bool, type(None))) for value in base.values())
    )
    if not good:
        raise ModelError("not a side file of ours", where=where, remedy="delete it to load as a plain PEFT adapter")
    if side and side.get("format") != _FORMAT:
        raise ModelError("written by another version", where=where, value=side.get("format"))


def _cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
