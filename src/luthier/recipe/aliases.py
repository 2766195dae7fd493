"""Names of other trainers (TRL, LLaMA-Factory, Axolotl, ms-swift, Unsloth) read as ours, each with a note.

An alias is understood at the top of the recipe and in the sections on the way to its target, so
`num_train_epochs` works flat and under `train:`. What a peer says and we do not have is refused with the
word that comes closest; what changes nothing here is dropped with a note. Saying one thing under two names
is an error: nobody can know which was meant.

Leaves out: whole configuration files of peers (`luthier import`), names whose meaning differs between peers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.contracts.errors import LuthierError, RecipeError
from luthier.recipe import mask_aliases
from luthier.recipe.document import Document, Steps, dotted
from luthier.recipe.forms import has, look

Read = Callable[[Any], Any]  # a peer's value to ours; ValueError says why not


def _same(value: Any) -> Any:
    return value


def _words(**table: Any) -> Read:
    return lambda value: table.get(value, value) if isinstance(value, str) else value


def _when_true(ours: Any, otherwise: Any) -> Read:
    def read(value: Any) -> Any:
        if isinstance(value, bool):
            return ours if value else otherwise
        return value

    return read


def _targets(value: Any) -> Any:
    if isinstance(value, str):
        return "all-linear" if value in {"all", "all-linear"} else [part.strip() for part in value.split(",")]
    return value


def _files(value: Any) -> Any:
    if isinstance(value, str) and "," in value:
        return [part.strip() for part in value.split(",")]
    return value


def _no_limit(value: Any) -> Any:
    return None if value == -1 else value


def _bits(value: Any) -> Any:
    return {4: "nf4", 8: "int8", 16: "none"}.get(value, value) if isinstance(value, int) else value


def _objective(value: Any) -> Any:
    if value == "ipo":
        raise ValueError("it is a loss of DPO: objective: {name: dpo, loss_type: ipo}")
    return {"rm": "reward", "pt": "sft"}.get(value, value) if isinstance(value, str) else value


def _pref_loss(value: Any) -> Any:
    if value in ("orpo", "simpo"):
        raise ValueError(f"it is an objective of its own: objective: {value}")
    if value == "kto_pair":
        raise ValueError("objective: kto reads pairs too")
    return value


SCHEDULES = _words(constant_with_warmup="constant", warmup_stable_decay="wsd", cosine_with_min_lr="cosine")
OPTIMIZERS = _words(
    adamw_torch="adamw", adamw_torch_fused="adamw", adamw_hf="adamw", AdamW="adamw", adamw_bnb_8bit="adamw_8bit",
    paged_adamw_32bit="paged_adamw", lion_32bit="lion",
)  # fmt: skip
PRECISIONS = _words(bfloat16="bf16", float32="fp32", fp32="fp32", float16="fp16", half="fp16", no="fp32")
DTYPES = _words(bf16="bfloat16", fp32="float32", fp16="float16", float="float32", half="float16")

# peer's name -> (our path, how its value reads)
PEERS: dict[str, tuple[str, Read]] = {
    **dict.fromkeys(("model_name_or_path", "base_model", "model_name", "model_id"), ("model.path", _same)),
    "model_revision": ("model.revision", _same),
    **dict.fromkeys(("torch_dtype", "dtype"), ("model.dtype", DTYPES)),
    "load_in_4bit": ("model.quantization", _when_true("nf4", "none")),
    **dict.fromkeys(("bnb_4bit_use_double_quant", "double_quantization"), ("model.double_quantization", _same)),
    "load_in_8bit": ("model.quantization", _when_true("int8", "none")),
    "quantization_bit": ("model.quantization", _bits),
    "chat_template": ("model.chat_template", mask_aliases.template),
    "chat_template_jinja": ("model.chat_template", _same),
    "chat_template_kwargs": ("model.template_variables", _same),
    "add_tokens": ("model.add_tokens", _same),
    **dict.fromkeys(("dataset", "datasets", "dataset_path", "train_file", "train_dataset", "data_path"),
                    ("data.train", _files)),
    **dict.fromkeys(("val_size", "val_set_size"), ("data.eval", _same)),
    **dict.fromkeys(("eval_dataset", "validation_file", "test_datasets"), ("data.eval", _files)),
    **dict.fromkeys(("cutoff_len", "max_length", "max_seq_length", "max_seq_len", "sequence_len"),
                    ("data.max_tokens", _same)),
    **dict.fromkeys(("packing", "sample_packing", "neat_packing"), ("data.packing", _when_true("forest", "none"))),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt", "roles_to_train"), ("data.mask.roles", mask_aliases.roles)),
    "assistant_only_loss": ("data.mask.roles", mask_aliases.only_answers),
    "loss_scale": ("data.mask.roles", mask_aliases.loss_scale),
    "mask_history": ("data.mask.last_turn_only", _same),
    **dict.fromkeys(("finetuning_type", "adapter", "tuner_type", "train_type"), ("method.name", _same)),
    **dict.fromkeys(("lora_r", "lora_rank"), ("method.r", _same)),
    "lora_alpha": ("method.lora_alpha", _same),
    "lora_dropout": ("method.lora_dropout", _same),
    **dict.fromkeys(("lora_target", "lora_target_modules", "target_modules"), ("method.target_modules", _targets)),
    "lora_target_linear": ("method.target_modules", _when_true("all-linear", None)),
    **dict.fromkeys(("lora_modules_to_save", "additional_target", "modules_to_save"),
                    ("method.modules_to_save", _files)),
    "use_rslora": ("method.use_rslora", _same),
    **dict.fromkeys(("stage", "rl", "rlhf_type"), ("objective.name", _objective)),
    **dict.fromkeys(("beta", "pref_beta", "rl_beta", "orpo_alpha"), ("objective.beta", _same)),
    "loss_type": ("objective.loss_type", _same),
    "pref_loss": ("objective.loss_type", _pref_loss),
    **dict.fromkeys(("label_smoothing", "dpo_label_smoothing"), ("objective.label_smoothing", _same)),
    **dict.fromkeys(("desirable_weight", "kto_desirable_weight", "kto_chosen_weight"),
                    ("objective.desirable_weight", _same)),
    **dict.fromkeys(("undesirable_weight", "kto_undesirable_weight", "kto_rejected_weight"),
                    ("objective.undesirable_weight", _same)),
    "precompute_ref_log_probs": ("objective.reference", _when_true("cached", "auto")),
    **{name: (f"objective.{name}", _same) for name in (
        "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "disable_dropout",
        "cpo_alpha", "simpo_gamma", "gamma_beta_ratio", "center_rewards_coefficient",
    )},
    **dict.fromkeys(("neftune_noise_alpha", "noisy_embedding_alpha"), ("regularizers.neftune.alpha", _same)),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), ("train.epochs", _same)),
    "max_steps": ("train.max_steps", _no_limit),
    **dict.fromkeys(("learning_rate", "lr"), ("train.learning_rate", _same)),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), ("train.schedule", SCHEDULES)),
    "warmup_ratio": ("train.warmup_ratio", _same),
    "weight_decay": ("train.weight_decay", _same),
    **dict.fromkeys(("max_grad_norm", "gradient_clipping", "clip_grad_norm"), ("train.max_grad_norm", _same)),
    **dict.fromkeys(("optim", "optimizer"), ("train.optimizer", OPTIMIZERS)),
    "save_steps": ("train.save_every", _same),
    "save_total_limit": ("train.keep", _same),
    "seed": ("train.seed", _same),
    "bf16": ("engine.precision", _when_true("bf16", "auto")),
    "fp16": ("engine.precision", _when_true("fp16", "auto")),
    "pure_bf16": ("engine.trained_dtype", _when_true("bfloat16", "auto")),
    "gradient_checkpointing": ("engine.checkpoint_activations", _same),
    "eval_steps": ("evaluate.every", _same),
}  # fmt: skip

# values of peers under our own names
_VALUES: dict[str, Read] = {
    "model.dtype": DTYPES, "train.schedule": SCHEDULES, "train.optimizer": OPTIMIZERS,
    "engine.precision": PRECISIONS, "engine.trained_dtype": DTYPES, "data.packing": _when_true("forest", "none"),
    "model.chat_template": mask_aliases.template,
}  # fmt: skip

_NAMED_LISTS = ("regularizers",)
_BATCH = ("per_device_train_batch_size", "per_device_batch_size", "micro_batch_size")
_ACCUMULATION = "gradient_accumulation_steps"

_REFUSED: dict[str, str] = {
    "warmup_steps": "give train.warmup_ratio, the share of all steps",
    "load_best_model_at_end": "evaluate.keep_best: eval_loss does this",
    "overwrite_output_dir": "pass --fresh to `luthier train` instead",
    "resume_from_checkpoint": "pass --resume to `luthier train` instead",
    "trust_remote_code": "code of a model directory is never run",
    **dict.fromkeys(
        ("rpo_alpha", "pref_ftx"), "objective: {name: dpo, loss_type: [sigmoid, sft], loss_weights: [1.0, it]}"
    ),
    **dict.fromkeys(("ref_model", "ref_model_name_or_path"), "the reference is the base that the run starts from"),
    "reference_free": "simpo, cpo and orpo need no reference",
    "sync_ref_model": "the reference stays as it is; not here yet",
    **dict.fromkeys(("use_weighting", "dpo_use_weighting"), "WPO needs the whole distribution at each token"),
    "max_prompt_length": "data.max_tokens bounds prompt and answer together",
    "deepspeed": "not here yet; engine.strategy: single",
    "fsdp": "not here yet; engine.strategy: single",
}
_DROPPED: dict[str, str] = {
    **dict.fromkeys(("logging_steps", "log_every_n_steps"), "every step is in the journal"),
    **dict.fromkeys(("preprocessing_num_workers", "dataloader_num_workers", "dataset_num_proc",
                     "dataloader_pin_memory", "overwrite_cache", "group_by_length", "plot_loss", "do_train"),
                    "nothing here depends on it"),
    **dict.fromkeys(("flash_attention", "flash_attn", "attn_implementation"), "the forest attention is always used"),
}  # fmt: skip

_SWITCHES = ("bf16", "fp16", "pure_bf16")  # of peers' files, which list all and switch on one

_PLACES: tuple[Steps, ...] = (
    (), ("model",), ("data",), ("data", "mask"), ("method",), ("objective",), ("train",), ("engine",), ("evaluate",),
)  # fmt: skip


def translate(document: Document) -> tuple[list[str], list[LuthierError]]:
    """Rewrite the document in our names; the notes say what was read as what."""
    notes: list[str] = []
    errors: list[LuthierError] = []
    for place in _PLACES:
        section = look(document.data, place)
        if isinstance(section, dict):
            _batch(document, place, section, notes, errors)
            for key in [key for key in section if isinstance(key, str)]:
                _one(document, (*place, key), notes, errors)
    for path, read in _VALUES.items():
        steps: Steps = tuple(path.split("."))
        if has(document.data, steps):
            old = look(document.data, steps)
            new = read(old)
            if new is not old and new != old:
                document.set(steps, new, like=steps)
                notes.append(f"{document.where(steps)}: `{path}: {_shown(old)}` is read as `{_shown(new)}`")
    return notes, errors


def peers_of(path: str) -> list[str]:
    """Names under which other trainers know the field at `path`."""
    found = [name for name, (target, _) in PEERS.items() if target == path and name != path.rpartition(".")[2]]
    return [*found, f"{_BATCH[0]} x {_ACCUMULATION}"] if path == "train.rows_per_step" else found


def _one(document: Document, steps: Steps, notes: list[str], errors: list[LuthierError]) -> None:
    place, key = steps[:-1], str(steps[-1])
    where = document.where(steps, key=True)
    if key in _REFUSED and not place:
        errors.append(RecipeError(f"`{key}` is another trainer's", where=where, remedy=_REFUSED[key]))
        del document.data[key]
    elif key in _DROPPED and place in ((), ("train",), ("data",)):
        del look(document.data, place)[key]
        notes.append(f"{where}: `{key}` is left out: {_DROPPED[key]}")
    elif key in mask_aliases.SETTLED and place in ((), ("data",), ("data", "mask")):
        _settled(document, place, key, where, notes, errors)
    elif key in _SWITCHES and look(document.data, steps) is False and place in ((), ("train",), ("engine",)):
        del look(document.data, place)[key]
        notes.append(f"{where}: `{key}: false` is left out: it asks for nothing")
    elif key in PEERS:
        target: Steps = tuple(PEERS[key][0].split("."))
        if target[0] in _NAMED_LISTS:
            _join(document, steps, target, notes, errors)
        elif target[: len(place)] == place and target != steps:
            _rename(document, steps, target, notes, errors)


def _settled(
    document: Document, place: Steps, key: str, where: str, notes: list[str], errors: list[LuthierError]
) -> None:
    """A setting of a peer that is met for some values: dropped with the reason, or refused with the way out."""
    value, rule = look(document.data, place).pop(key), mask_aliases.SETTLED[key]
    if not rule.remedies or value in rule.met:
        notes.append(f"{where}: `{key}: {_shown(value)}` is left out: {rule.note}")
    else:
        errors.append(RecipeError(f"`{key}` has no counterpart", where=where, value=value, remedy=rule.remedy(value)))


def _rename(document: Document, steps: Steps, target: Steps, notes: list[str], errors: list[LuthierError]) -> None:
    where, key = document.where(steps, key=True), str(steps[-1])
    for end in range(1, len(target)):
        if look(document.data, target[:end]) is not None and not isinstance(look(document.data, target[:end]), dict):
            return  # a section of the wrong type: the checker says so
    old = look(document.data, steps[:-1]).pop(key)
    if has(document.data, target):
        errors.append(_twice(document, steps, target))
        return
    try:
        new = PEERS[key][1](old)
    except ValueError as reason:
        errors.append(RecipeError(f"`{key}` has no counterpart", where=where, value=old, remedy=str(reason)))
        return
    document.set(target, new, like=steps)
    document.move(steps, target)
    notes.append(f"{where}: `{key}: {_shown(old)}` is read as `{dotted(target)}: {_shown(new)}`")


def _join(document: Document, steps: Steps, target: Steps, notes: list[str], errors: list[LuthierError]) -> None:
    """A field of one entry of a list: the entry is added. None and 0 are how peers say that there is none."""
    where, (room, name, field) = document.where(steps, key=True), target
    listed = look(document.data, (room,)) or []
    if not isinstance(listed, list):
        return  # the checker says so
    value = look(document.data, steps[:-1]).pop(steps[-1])
    if value in (None, 0) and not isinstance(value, bool):
        notes.append(f"{where}: `{steps[-1]}: {_shown(value)}` is left out: it asks for nothing")
        return
    there = [index for index, entry in enumerate(listed) if isinstance(entry, dict) and entry.get("name") == name]
    if there:
        errors.append(_twice(document, steps, (room, there[0])))
        return
    entry: Steps = (room, len(listed))
    document.set((room,), [*listed, {"name": name, field: value}], like=steps if not listed else (room,))
    if document.values:
        document.values.update({(*entry, key): document.where(steps) for key in ("name", field)})
        document.values[entry] = document.keys[entry] = where
    notes.append(f"{where}: `{steps[-1]}: {_shown(value)}` is read as `{room}: [{{name: {name}, {field}: {value}}}]`")


def _batch(
    document: Document, place: Steps, section: dict[Any, Any], notes: list[str], errors: list[LuthierError]
) -> None:
    """per-device batch x accumulation -> rows of one optimizer step."""
    if place not in ((), ("train",)):
        return
    named = [key for key in _BATCH if key in section]
    steps: Steps = (*place, named[0] if named else _ACCUMULATION)
    if not named and _ACCUMULATION not in section:
        return
    where = document.where(steps, key=True)
    each, times = (section[named[0]] if named else None), section.get(_ACCUMULATION, 1)
    target: Steps = ("train", "rows_per_step")
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (each, times))
    if not named:
        remedy = "give train.rows_per_step, the rows of a whole optimizer step"
        errors.append(RecipeError(f"`{_ACCUMULATION}` alone says no batch", where=where, value=times, remedy=remedy))
    elif len(named) > 1:
        errors.append(_twice(document, (*place, named[1]), steps))
    elif not whole:
        remedy = "whole numbers above 0"
        errors.append(RecipeError(f"`{named[0]}` x `{_ACCUMULATION}` is no number of rows", where=where,
                                  value=f"{each} x {times}", remedy=remedy))  # fmt: skip
    elif has(document.data, target):
        errors.append(_twice(document, steps, target))
    else:
        document.set(target, each * times, like=steps)
        notes.append(f"{where}: `{named[0]}: {each}` x `{_ACCUMULATION}: {times}` is read as "
                     f"`train.rows_per_step: {each * times}` (the whole step, over all devices)")  # fmt: skip
    for key in (*named, _ACCUMULATION):
        section.pop(key, None)


def _twice(document: Document, steps: Steps, target: Steps) -> RecipeError:
    other = document.where(target, key=True)
    what = f"`{steps[-1]}` and `{dotted(target)}` say one thing twice"
    return RecipeError(what, where=document.where(steps, key=True), remedy=f"keep one (the other: {other})")


def _shown(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return f"({len(value)} entries)"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
