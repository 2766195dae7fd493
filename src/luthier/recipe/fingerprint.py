"""What makes two runs the same run: identity fields, benign fields, and digests.

A resume refuses when an identity field differs and goes on, saying so, when a benign one does. The course of
the learning rate and the length of the run are identity too, unless the person names the checkpoint to start
from (`--resume PATH`). Contents of files (rows, weights, tokenizer) are digested by the rooms that read them;
here are only the words of the recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from luthier.recipe.recipe import Recipe

_BENIGN = (
    "evaluate", "report_to", "output_dir", "train.save_every", "train.keep",
    "engine.strategy", "engine.device", "engine.threads", "engine.checkpoint_activations", "engine.memory",
    "engine.offload_activations", "engine.offload_optimizer",
)  # fmt: skip
_COURSE = (
    "train.learning_rate", "train.schedule", "train.warmup_ratio", "train.min_lr_ratio", "train.decay_ratio",
    "train.epochs", "train.max_steps",
)  # fmt: skip
_ABSENT = "(absent)"


def digest(value: Any) -> str:
    """sha256 of canonical JSON: sorted keys, no spaces, UTF-8, tuples as lists; not finite is refused."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def identity(recipe: Recipe, *, named_checkpoint: bool = False) -> dict[str, Any]:
    """Flat `path: value` of the fields that must not change on resume."""
    return {path: value for path, value in flat(recipe) if not _is_benign(path, value, named_checkpoint)}


def benign(recipe: Recipe, *, named_checkpoint: bool = False) -> dict[str, Any]:
    """Flat `path: value` of the fields that may change; identity and benign together are the whole recipe."""
    return {path: value for path, value in flat(recipe) if _is_benign(path, value, named_checkpoint)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`path: old -> new` for each field that differs, in the order of `old`, then what is new."""
    found = []
    for path in [*old, *(path for path in new if path not in old)]:
        before, after = old.get(path, _ABSENT), new.get(path, _ABSENT)
        if (type(before) is not type(after) and not _both_numbers(before, after)) or before != after:
            found.append(f"{path}: {_shown(before)} -> {_shown(after)}")
    return found


def flat(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Every field by its path; lists are one value, but for lists of sources, which stay whole too."""
    yield from _flat(recipe.resolved(), "")


def _flat(data: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        here = f"{path}.{key}".removeprefix(".")
        if isinstance(value, dict) and value:
            yield from _flat(value, here)
        else:
            yield here, value


def _is_benign(path: str, value: Any, named_checkpoint: bool) -> bool:
    if path == "data.eval":  # a share is taken out of the training rows; files of their own are not
        return not isinstance(value, float)
    if named_checkpoint and path in _COURSE:
        return True
    return any(path == name or path.startswith(f"{name}.") for name in _BENIGN)


def _both_numbers(one: Any, other: Any) -> bool:
    return all(isinstance(n, int | float) and not isinstance(n, bool) for n in (one, other))


def _shown(value: Any) -> str:
    return value if value == _ABSENT else json.dumps(value, ensure_ascii=False)
