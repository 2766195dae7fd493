"""A model and its tokenizer from a local directory, and back into one.

The directory is scanned first (models/directory.py): nothing in it can run code and nothing is fetched. Weights
that are missing or do not fit are refused with their count; weights the model has no place for are listed.
New tokens (`model.add_tokens`) become special, atomic tokens; their rows in the embedding (and in an untied
head) start as the mean of the rows in use before, so they are ordinary points of the space and need no seed.
What trains, and in which precision it computes, is decided elsewhere; `dtype` is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from luthier.contracts.errors import LuthierError, ModelError
from luthier.models.directory import find_directory, fingerprint, read_json, scan, weight_files
from luthier.models.packed_starts import Before
from luthier.models.quantise import check_device, format_of
from luthier.models.quantised_load import Wanted, forget, quantizer_for, release
from luthier.models.replace import replace_directory
from luthier.models.score_head import HEAD, check_family, check_head, is_saved_with_score, settle_padding, start_head
from luthier.models.stored_files import save_packed, stored_linears
from luthier.models.switch import native_attention

if TYPE_CHECKING:
    from luthier.recipe.recipe import ModelSection

BeforePacking = Callable[[nn.Module], Before | None]
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Loaded:
    """What a directory gave."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    generation_stop_ids: tuple[int, ...]
    path: Path
    fingerprint: str
    added: dict[str, int]  # the tokens of `model.add_tokens` and their ids
    unexpected: tuple[str, ...] = ()  # weights in the files that the model has no place for
    reads: str = "logprobs"  # or "scores": a reward model
    new_head: bool = False  # the score head is not in the files: drawn from `head_seed`


@dataclass(frozen=True)
class TextSide:
    """What a directory says about text, without its weights."""

    tokenizer: PreTrainedTokenizerFast
    stop_ids: tuple[int, ...]
    max_positions: int | None  # the longest row that the model was built for


def load_text(section: ModelSection) -> TextSide:
    """Tokenizer (with `model.add_tokens`), stop ids and length: enough to read data, in a fraction of a second."""
    directory = find_directory(section.path, section.revision)
    scan(directory)
    with _quiet():
        tokenizer = load_tokenizer(directory)
    extend(tokenizer, section.add_tokens)
    generation = directory / "generation_config.json"
    configured = read_json(generation).get("eos_token_id") if generation.is_file() else None
    config = read_json(directory / "config.json")
    text = config.get("text_config") or config
    most = text.get("max_position_embeddings") or text.get("n_positions")
    return TextSide(tokenizer, _ends(configured, tokenizer), most if isinstance(most, int) else None)


def load_model(
    section: ModelSection, *, dtype: torch.dtype, device: torch.device | str = "cpu", reads: str = "logprobs",
    head_seed: int = 0, before_packing: BeforePacking | None = None,
) -> Loaded:  # fmt: skip
    """Model in eval mode, tokenizer, template and stop ids as `section` asks. ModelError otherwise.

    `reads`: logprobs (a language model), scores (a reward model, of a language model too: its head is then new), or
    saved (whichever of the two the directory says). `before_packing`: of the model without its weights, what a method
    does with each matrix before it is packed.
    """
    check_device(section.quantization, device)
    directory = find_directory(section.path, section.revision)
    saved_with_score = is_saved_with_score(scan(directory))
    reads = ("scores" if saved_with_score else "logprobs") if reads == "saved" else reads
    weight_files(directory)
    with _quiet():
        model, unexpected = _model(directory, dtype, reads, _wanted(section, directory, before_packing))
        tokenizer = load_tokenizer(directory)
    added = add_tokens(model, tokenizer, section.add_tokens)
    if reads == "scores":
        settle_padding(model, tokenizer, stop_ids(model, tokenizer))
        if not saved_with_score:
            start_head(model, head_seed)
        model.get_submodule(HEAD).float()  # one row: its precision costs nothing
    model.to(device).eval()  # type: ignore[arg-type]
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        generation_stop_ids=stop_ids(model, tokenizer),
        path=directory,
        fingerprint=fingerprint(directory),
        added=added,
        unexpected=unexpected,
        reads=reads,
        new_head=reads == "scores" and not saved_with_score,
    )


def _wanted(section: ModelSection, directory: Path, before: BeforePacking | None) -> Wanted | None:
    """The storage format: that of the files, where they are packed already, else the recipe's."""
    if (found := stored_linears(directory)) is None:
        asked = section.quantization
        return None if asked == "none" else Wanted(asked, section.double_quantization, before=before)
    if section.quantization not in ("none", found.format):
        raise ModelError(
            f"the files are in {found.format} already", where="model.quantization", value=section.quantization,
            remedy="set it to none, or pass the dense model",
        )  # fmt: skip
    return found


def _model(
    directory: Path, dtype: torch.dtype, reads: str, wanted: Wanted | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    model_type = read_json(directory / "config.json")["model_type"]
    saved_with_score = is_saved_with_score(read_json(directory / "config.json"))
    where = str(directory / "config.json")
    try:
        config = AutoConfig.from_pretrained(directory, **_LOCAL)
    except Exception as error:  # the loader raises whatever it likes
        raise ModelError(f"transformers cannot read it: {_first(error)}", where=where, value=model_type) from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError("not a causal language model that transformers knows", where=where, value=model_type)
    kind: Any = AutoModelForCausalLM
    if reads == "scores":
        check_family(config.model_type, where)
        kind = AutoModelForSequenceClassification
        if not saved_with_score:
            config.num_labels = 1
    elif saved_with_score:
        raise ModelError("a reward model: it has a score head and no language head", where=where,
                         value=config.architectures[0],
                         remedy="pass the language model it was made from, or use objective: reward")  # fmt: skip
    forget(config)
    try:
        with quantizer_for(wanted, config) as more:
            model, report = kind.from_pretrained(
                directory, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **more, **_LOCAL
            )
        release(model)
    except LuthierError:
        raise
    except Exception as error:
        raise ModelError(f"the weights do not load: {_first(error)}", where=str(directory)) from error
    if reads == "scores":
        check_head(model, where)
    _check_whole(
        report, directory, expected={f"{HEAD}.weight"} if reads == "scores" and not saved_with_score else set()
    )
    unexpected = {str(name) for name in report.get("unexpected_keys", ())}
    if wanted is not None and wanted.stored is not None:
        unexpected = {name for name in unexpected if not any(name.startswith(f"{path}.") for path in wanted.stored)}
    return model, tuple(sorted(unexpected - ({"lm_head.weight", "lm_head.bias"} if reads == "scores" else set())))


def _check_whole(report: dict[str, Any], directory: Path, expected: set[str]) -> None:
    """ModelError where the files lack a weight that is not `expected` to be new, or have another shape of one."""
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted({str(name) for name in report.get(what, ())} - expected)
        if names:
            kind = what.removesuffix("_keys")
            raise ModelError(
                f"{len(names)} of the model's weights are {kind} in the files",
                where=str(directory),
                value=names[0],
                remedy="fetch the model again, or pass the directory its config.json belongs to",
            )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The directory's fast tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=True, **_LOCAL)
    except Exception as error:
        raise ModelError(f"the tokenizer does not load: {_first(error)}", where=str(directory)) from error
    if not tokenizer.is_fast:
        raise ModelError(
            "only fast tokenizers are supported: exact token masks need their offsets",
            where=str(directory),
            value=type(tokenizer).__name__,
            remedy="add its tokenizer.json",
        )
    return tokenizer


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Where generation ends: generation_config's and the tokenizer's end tokens."""
    generation = getattr(model, "generation_config", None)
    configured = getattr(generation, "eos_token_id", None)
    return _ends(configured, tokenizer)


def _ends(configured: Any, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    found = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


@torch.no_grad()
def add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokens: Any) -> dict[str, int]:
    """Make each text one special token; token -> id. New rows are the mean of the rows in use before."""
    used = len(tokenizer)
    extend(tokenizer, tokens)
    if len(tokenizer) > used:
        _grow(model, used, len(tokenizer))
    return {token: tokenizer.convert_tokens_to_ids(token) for token in dict.fromkeys(tokens)}


def extend(tokenizer: PreTrainedTokenizerFast, tokens: Any) -> None:
    """Make each text one special token of the tokenizer; those that are already stay as they are."""
    atomic = {token.content for token in tokenizer.added_tokens_decoder.values()}
    fresh = [token for token in dict.fromkeys(tokens) if token not in atomic]
    if any(not token for token in fresh):
        raise ModelError("an added token cannot be empty", where="model.add_tokens")
    if plain := [token for token in fresh if token.isalnum() and token in tokenizer.get_vocab()]:
        raise ModelError(
            "a word of the tokenizer cannot become a control token: every text holds it", where="model.add_tokens",
            value=plain, remedy="add strings that no text holds, such as <|name|>",
        )  # fmt: skip
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in fresh], special_tokens=True)


def _grow(model: PreTrainedModel, used: int, needed: int) -> None:
    """Rows used..needed-1 of embedding, head and head bias become the mean of the rows before them."""
    if model.get_input_embeddings().weight.shape[0] < needed:
        model.resize_token_embeddings(needed, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    done: set[int] = set()
    for parameter in [p for table in tables if table is not None for p in table.parameters(recurse=False)]:
        if parameter.shape[0] >= needed and id(parameter) not in done:
            parameter[used:needed] = parameter[:used].float().mean(0).to(parameter.dtype)
            done.add(id(parameter))


def save_whole(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, template: str | None, directory: Path | str
) -> Path:
    """A directory in Hugging Face layout that `load_model` (and everybody else) reads back; replaced as a whole."""
    directory = Path(directory)
    with replace_directory(directory) as fresh:
        with native_attention(model), _quiet():
            if format_of(model) == "none":
                model.save_pretrained(fresh)
            else:
                save_packed(model, fresh)
        save_tokenizer(tokenizer, template, fresh)
    return directory


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, template: str | None, directory: Path | str) -> None:
    """The tokenizer's files, and the chat template in force as chat_template.jinja."""
    tokenizer.save_pretrained(directory)
    if template is not None:
        (Path(directory) / "chat_template.jinja").write_text(template, encoding="utf-8")


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own bars and load reports off; what they say, we check."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
