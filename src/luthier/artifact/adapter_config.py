"""`adapter_config.json` from anywhere: an allow-list of keys with types and ranges, before anything else sees it.

What a config can do to a loader that trusts it (advisories on PEFT, transformers, vLLM): name a library to import
(`auto_mapping.parent_library`, `megatron_core`), switch on remote code, hang a regex, ask for a rank of a million.
Here a key is known and has a checked value, or it is unknown and dropped with a note, or it is refused by name.
Nothing is imported, opened or compiled from what a config says. Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luthier.contracts.errors import ModelError, raise_all

LARGEST_FILE = 1 << 20
LARGEST_RANK = 4096
LONGEST_TEXT = 2048
MOST_NAMES = 20_000
MOST_PATTERNS = 2_000
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

Check = tuple[Callable[[Any], bool], str]


def _whole(low: int, high: int) -> Check:
    return (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high
    ), f"a whole number from {low} to {high}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and value.isprintable()


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_NAMES and all(map(_text, value))


def _layers(value: Any) -> bool:
    many = value if isinstance(value, list) else [value]
    return len(many) <= MOST_NAMES and all(_whole(0, 10_000)[0](item) for item in many)


def _ids(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    good = _whole(0, 1 << 31)[0]
    return len(lists) <= 8 and all(
        isinstance(ids, list) and 0 < len(ids) <= MOST_NAMES and all(map(good, ids)) for ids in lists
    )


def safe_pattern(text: str) -> bool:
    """A regex that cannot run away on a path: no repeated group, no back-reference, at most two open repeats."""
    if not _text(text) or re.search(r"\)[*+?{]|\\\d|\(\?P=|[*+}][*+{]", text):
        return False
    return len(re.findall(r"[*+]|\{\d*,\d*\}", text)) <= 2


def _patterns(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: (
        isinstance(v, dict) and len(v) <= MOST_PATTERNS and all(safe_pattern(k) and good(x) for k, x in v.items())
    )


_FLAG: Check = (lambda v: isinstance(v, bool), "true or false")
_WORD: Check = (_text, f"a text of at most {LONGEST_TEXT} characters")
_NAMES: Check = (_texts, f"a list of at most {MOST_NAMES} names")
_NAMES_OR_WORD: Check = (lambda v: _text(v) or _texts(v), "a name or a list of names")
_PATTERNS: Check = (
    lambda v: safe_pattern(v) or (_texts(v) and all(map(safe_pattern, v))),
    "module names or simple patterns",
)
_ALPHA: Check = (lambda v: _is_number(v) and 0 < v <= 1e6, "a number above 0, at most 1e6")
_RANK: Check = _whole(1, LARGEST_RANK)

CHECKS: dict[str, Check] = {
    "peft_type": (lambda v: _text(v) and re.fullmatch(r"[A-Z0-9_]{1,64}", v) is not None, "a PEFT type"),
    "task_type": (lambda v: v in _TASKS, f"one of {', '.join(_TASKS)}"),
    "base_model_name_or_path": _WORD,
    "revision": _WORD,
    "inference_mode": _FLAG,
    "peft_version": _WORD,
    "r": _RANK,
    "lora_alpha": _ALPHA,
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "target_modules": _NAMES_OR_WORD,
    "exclude_modules": _NAMES_OR_WORD,
    "fan_in_fan_out": _FLAG,
    "bias": (lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "use_qalora": _FLAG,
    "lora_bias": _FLAG,
    "ensure_weight_tying": _FLAG,
    "modules_to_save": (lambda v: isinstance(v, list) and _PATTERNS[0](v), _PATTERNS[1]),
    "init_lora_weights": (lambda v: isinstance(v, bool) or _text(v), "true, false or a name"),
    "layers_to_transform": (_layers, "a layer number or a list of them"),
    "layers_pattern": _PATTERNS,
    "rank_pattern": (_patterns(_RANK[0]), f"simple patterns, each with {_RANK[1]}"),
    "alpha_pattern": (_patterns(_ALPHA[0]), f"simple patterns, each with {_ALPHA[1]}"),
    "trainable_token_indices": (_ids, "token ids, or a list of them per module"),
    "target_parameters": _NAMES,
    "feedforward_modules": _PATTERNS,
    "adapter_dtype": (lambda v: v in ("fp32", "bf16"), "fp32 or bf16"),
}
_REFUSED = {
    "auto_mapping": "it names a library to import",
    "megatron_config": "it configures an import",
    "tokenizer_kwargs": "it can switch on remote code",
    "trust_remote_code": "it switches on remote code",
    "auto_map": "it names code to import",
}
_ONLY_FOR_TRAINING = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config")
_QUIET = ("qalora_group_size", "megatron_core")  # PEFT writes these into every file
_CHANGES_MATHS = (
    "layer_replication", "arrow_config", "use_bdlora", "velora_config", "kasa_config", "monteclora_config",
    "alora_invocation_tokens",
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; ModelError for anything else."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ModelError("the file is too large for what it is", where=str(path), value=f"{size} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("the adapter directory lacks a file", where=str(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"not readable as JSON: {type(error).__name__}", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError("not a JSON object", where=str(path), value=type(value).__name__)
    return value


def check_config(
    config: Mapping[str, Any], where: str, more: Mapping[str, Check] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """(the known keys with good values, notes on dropped ones). `more`: keys that a method adds to the list."""
    checks = {**CHECKS, **(more or {})}
    errors: list[ModelError] = []
    clean: dict[str, Any] = {}
    notes: list[str] = []
    for key, value in config.items():
        if key in _REFUSED or (key == "megatron_core" and value not in (None, "megatron.core")):
            if value:
                reason = _REFUSED.get(key, "it names a library to import")
                errors.append(ModelError(f"{key} is refused: {reason}", where=f"{where}: {key}", value=value))
        elif value is None or value == {} or value == [] or key in _QUIET:
            continue
        elif key in checks:
            good, expected = checks[key]
            if good(value):
                clean[key] = value
            else:
                errors.append(ModelError(f"{key} must be {expected}", where=f"{where}: {key}", value=value))
        elif key in _CHANGES_MATHS:
            if value is not False:
                errors.append(ModelError(f"{key} is not supported here", where=f"{where}: {key}", value=value))
        elif key in _ONLY_FOR_TRAINING:
            notes.append(f"{where}: {key} says how the adapter was started; not needed to load it")
        else:
            notes.append(f"{where}: unknown key {key[:80]!r} dropped")
    raise_all(errors)
    if "peft_type" not in clean:
        raise ModelError("no peft_type: not an adapter", where=where, remedy="is this a whole model?")
    return clean, notes
