"""The typed tree of a recipe: what a person wants, in frozen sections that refuse unknown keys.

    model   which weights            method     how they change      train   how long, how fast, in what batches
    data    which rows, which mask   objective  what is minimised    engine  where it runs      evaluate  on what
    regularizers  what rides beside method and objective     data.steps  what happens to the rows first

Every field carries its unit and one line of "why change it"; the JSON Schema, `luthier explain` and the
editors read them from here. `Recipe(model="path", data="x.jsonl", method=LoRA(r=16))` accepts what the YAML
accepts, and dataclasses. `resolved()` is plain data that reads back to an equal recipe.

Leaves out: the fields of methods, objectives, regularizers and data steps (their dataclasses are the sections;
`schema.json` lists them), anything that needs a model, and torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError

from luthier.contracts.errors import RecipeError, raise_all
from luthier.recipe.check import checked
from luthier.recipe.resolve import names

Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]
Beta = Annotated[float, Strict(), Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
OptimizerName = Annotated[Name, AfterValidator(lambda name: _of_room("optimizers", name))]
_AMOUNT = r"^ *[0-9]*[1-9][0-9]*([.][0-9]+)? *([kKmMgGtT][iI]?)?[bB]? *$"
Amount = Annotated[str, Field(pattern=_AMOUNT, examples=["24GB"])]  # of memory
Schedule = Literal["cosine", "linear", "wsd", "constant"]
Role = Literal["system", "developer", "user", "assistant", "tool"]


def _of_room(room: str, name: str) -> str:
    if name not in names(room):
        raise ValueError(f"one of: {', '.join(names(room))}")
    return name


class Section(BaseModel):
    """Frozen, no unknown keys, finite numbers only."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def _field(default: Any, doc: str, *, unit: str = "", **limits: Any) -> Any:
    extra: dict[str, Any] = {"x-unit": unit} if unit else {}
    return Field(default, description=doc, json_schema_extra=extra or None, **limits)


class ModelSection(Section):
    """The base model: where its weights are and how they are opened."""

    path: Name = _field(..., "Directory with safetensors weights, or a hub id that is in the local cache.")
    revision: Name | None = _field(None, "Hub revision; pin it so that the same recipe means the same weights.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _field(
        "auto", "Number format of frozen weights; auto follows engine.precision, float32 costs twice the memory."
    )
    quantization: Literal["none", "nf4", "int8", "fp8"] = _field(
        "none",
        "Storage of frozen linear weights; nf4 needs a quarter of bf16's memory (QLoRA). none takes a checkpoint "
        "that is packed already (GPTQ, AWQ, bitsandbytes) as it is.",
    )
    double_quantization: Bool = _field(
        True, "With nf4: its scales in 8 bits too, which saves 0.37 bits a weight; false only to match another program."
    )
    add_tokens: tuple[Name, ...] = _field(
        (), "New atomic tokens, such as a template's control strings; their rows train and travel with the adapter."
    )
    chat_template: Name | None = _field(
        None, "Template file or name, where the tokenizer has none or the wrong one. Default: the tokenizer's."
    )
    template_variables: dict[str, Any] = _field(
        {}, "Values of the template's own variables, such as {enable_thinking: false}; saved inside the template."
    )
    attention: Literal["auto", "forest", "unpacked"] = _field(
        "auto", "auto packs rows where the self-check at load proves it exact; unpacked never packs."
    )


class DataSource(Section):
    """One source of rows in a list."""

    path: Name = _field(
        ..., "File, directory, glob or hub id: jsonl, json, parquet, csv, arrow, txt, also .gz and .zst."
    )
    weight: Float = _field(1.0, "How often its rows are seen per epoch; 0.5 takes half of them.", unit="times", gt=0)
    format: Name | None = _field(
        None, "Shape of the rows, a name of data/formats such as messages or alpaca; default: detected."
    )
    split: Name | None = _field(None, "Split of a data set directory or a hub data set, such as train.")
    subset: Name | None = _field(None, "Configuration of a hub data set, where it has several.")
    dataset: Name | None = _field(
        None, "Where path is a dataset_info.json (LLaMA-Factory): the names of its data sets, with commas between."
    )
    columns: dict[str, str | None] | None = _field(
        None, "Columns by other names, ours: theirs; messages.role: from renames inside turns, null leaves one out."
    )
    role_names: dict[str, str] | None = _field(None, "Roles by other names, theirs: ours, such as bot: assistant.")
    train_roles: tuple[Role, ...] | None = _field(
        None, "Roles whose words train in this source, in place of data.mask.roles.", min_length=1
    )
    max_rows: Int | None = _field(None, "Take so many of its rows, chosen by train.seed.", unit="rows", ge=1)
    shard: Annotated[str, Field(pattern=r"^[1-9]\d{0,5}/[1-9]\d{0,5}$")] | None = _field(
        None, "Take one part of its rows, such as 2/10: the second of ten, chosen by train.seed."
    )
    name: Name | None = _field(
        None, "What steps, mixture and reports call this source; default: the file's name without its ending."
    )


class MaskSection(Section):
    """Which tokens of a conversation are trained."""

    roles: tuple[Role, ...] = _field(
        ("assistant",), "Roles whose words are trained; add user to model both sides.", min_length=1
    )
    last_turn_only: Bool = _field(False, "Train the last assistant turn only, when earlier turns are of lower quality.")
    thinking: Literal["as_template", "split", "keep_all"] = _field(
        "as_template",
        "Reasoning: as_template trains what the template shows; split makes one row per answer; keep_all shows it all.",
    )
    train_generation_prompt: Bool = _field(
        False, "Also train what the generation prompt adds after the role header, such as <think>."
    )


class DataSection(Section):
    """The rows: where they are, how long they may be, which tokens count."""

    train: tuple[DataSource, ...] = _field(..., "Training rows: a file, a glob, or a list of sources.", min_length=1)
    eval: Annotated[float, Strict(), Field(gt=0, lt=1)] | tuple[DataSource, ...] | None = _field(
        None, "Held-out rows: a share of the training rows, such as 0.05, or files of their own.", unit="share"
    )
    max_tokens: Int = _field(
        2048, "Longest sequence; memory grows with it, rows beyond it go by `overlong`.", unit="tokens", ge=8
    )
    overlong: Literal["drop", "truncate_left", "truncate_right", "truncate_turns", "split", "error"] = _field(
        "drop",
        "Rows beyond max_tokens; drop counts them in the ledger, truncate_turns leaves out the oldest exchanges, "
        "split makes several rows.",
    )
    packing: Literal["forest", "none"] = _field(
        "forest", "forest packs rows without padding and without contamination; none runs each row alone (slow)."
    )
    mask: MaskSection = _field(MaskSection(), "Which tokens are trained.")
    workers: Literal["auto"] | Annotated[int, Strict(), Field(ge=0, le=512)] = _field(
        "auto", "Processes that encode rows; auto: one for each 16 MiB of files, at most one a core; 0: the run's own.",
        unit="processes",
    )  # fmt: skip
    cache: Literal["auto", "off"] | Annotated[float, Strict(), Field(gt=0)] = _field(
        "auto", "Keep encoded rows for later runs: auto from 4 MiB on, in a tenth of the disk; a number: all, in that.",
        unit="GiB",
    )  # fmt: skip
    steps: tuple[dict[str, Any], ...] = _field(
        (), "What happens to the rows before training, in this order: names of steps, or mappings with their fields."
    )
    bad_rows: Literal["strict", "quarantine"] = _field(
        "strict", "strict stops at rows that cannot be read; quarantine writes them to rejects.jsonl and goes on."
    )
    injection: Literal["escape", "error", "allow"] = _field(
        "escape",
        "Control strings inside content: ordinary text (escape), a wrong row (error), or control tokens (allow).",
    )


class StageSection(Section):
    """One stage of a progressive training, by steps or by epochs; what it does not say is the train section's."""

    name: Name | None = _field(None, "What the journal calls it; default: its number.")
    steps: Int | None = _field(None, "How long, in optimizer steps; the rows repeat if they must.", unit="steps", gt=0)
    epochs: Float | None = _field(None, "How long, in passes over its rows.", unit="epochs", gt=0)
    learning_rate: Float | None = _field(
        None, "Peak step size of the stage; a low one first lets new weights settle.", gt=0
    )
    tokens_per_step: Int | None = _field(
        None, "Packed tokens of one of its optimizer steps; more is smoother.", unit="tokens", gt=0
    )
    rows_per_step: Int | None = _field(None, "Rows of one of its optimizer steps instead.", unit="rows", gt=0)
    schedule: Schedule | None = _field(None, "Course of the rate within the stage, after its own warm-up.")
    warmup_ratio: Share | None = _field(
        None, "Share of the stage's steps in which the rate rises from zero.", unit="share"
    )
    min_lr_ratio: Share | None = _field(
        None, "Where the rate of the stage ends, relative to its learning_rate.", unit="share"
    )
    decay_ratio: Share | None = _field(
        None, "Share of the stage's last steps in which schedule wsd falls.", unit="share"
    )
    optimizer_state: Literal["kept", "reset"] = _field(
        "kept", "reset starts the stage with fresh averages, for other rows or a rate that jumps."
    )
    unfreeze: tuple[Name, ...] | None = _field(
        None, "Regexes from the start of parameter names: of what the method trains, only these move. Default: all.",
        min_length=1,
    )  # fmt: skip
    data: tuple[DataSource, ...] | None = _field(
        None, "Rows of the stage: a file, a glob, or a list of sources; default: data.train.", min_length=1
    )


class TrainSection(Section):
    """How long, how fast, in what batches."""

    epochs: Float = _field(1.0, "Passes over the rows; more than 3 tends to memorise.", unit="epochs", gt=0)
    max_steps: Int | None = _field(
        None, "Stop after so many optimizer steps instead; the rows repeat if they must.", unit="steps", gt=0
    )
    learning_rate: Float | None = _field(
        None,
        "Peak step size; default by method (lora 2e-4, full 2e-5), a share of it for preferences (dpo and kto a "
        "twentieth). Lower it when the loss jumps.",
        gt=0,
    )
    tokens_per_step: Int | None = _field(
        16384, "All packed tokens of one optimizer step, prompts included; more is smoother and slower.",
        unit="tokens", gt=0,
    )  # fmt: skip
    rows_per_step: Int | None = _field(
        None, "Rows of one optimizer step, in place of tokens_per_step; for comparison with other trainers.",
        unit="rows", gt=0,
    )  # fmt: skip
    microbatch_tokens: Literal["auto"] | Annotated[int, Strict(), Field(gt=0)] = _field(
        "auto",
        "Tokens computed at once, give or take 5 %; lower it to save memory, the result stays the same.",
        unit="tokens",
    )
    schedule: Schedule = _field("cosine", "Course of the learning rate after warm-up; constant for short probes.")
    warmup_ratio: Share = _field(0.03, "Share of the steps in which the rate rises from zero.", unit="share")
    min_lr_ratio: Share = _field(0.0, "Where the rate ends, relative to learning_rate.", unit="share")
    decay_ratio: Share = _field(0.1, "Share of the last steps in which schedule wsd falls.", unit="share")
    weight_decay: Float = _field(0.0, "Pull of the weights to zero (decoupled); 0.01-0.1 when overfitting.", ge=0)
    adam_betas: tuple[Beta, Beta] = _field(
        (0.9, 0.999),
        "Memory of the averages; (0.9, 0.95) for long runs with large batches. Lion's default: (0.9, 0.99).",
    )
    max_grad_norm: Float = _field(1.0, "Gradients beyond this global norm are scaled down; 0 turns it off.", ge=0)
    optimizer: OptimizerName = _field(
        "adamw", "Rule of the update; adamw_8bit keeps a quarter of AdamW's state, adafactor next to none, lion half."
    )
    optimizer_in_backward: Bool = _field(
        False, "Update each tensor as its gradient is made and free that: less memory for method full, no clipping."
    )
    save_every: Int | None = _field(
        None, "Steps between checkpoints; default: about ten over the run, and one at its end.", unit="steps", gt=0
    )
    keep: Int = _field(3, "Newest checkpoints that stay on disk (the best one stays besides).", unit="count", ge=1)
    seed: Int = _field(42, "Start of every random stream: order, dropout, new weights.", ge=0, lt=2**63)
    stages: tuple[StageSection, ...] = _field(
        (), "Progressive training: stages after one another, each with its own rate, batch, length and rows."
    )
    pack_window: Int = _field(
        1024, "Rows shuffled together before packing; larger packs tighter, smaller mixes lengths more.",
        unit="rows", ge=1,
    )  # fmt: skip


class EngineSection(Section):
    """Where the work runs; nothing here changes what is learnt, but for precision."""

    strategy: Literal["auto", "single"] = _field("auto", "How devices share the work; auto takes single on one device.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _field(
        "auto",
        "Number format of the computation; auto takes bf16 on GPUs that have it, fp32 on CPU; fp16, with a loss scale, "
        "is for GPUs without bf16.",
    )
    trained_dtype: Literal["auto", "float32", "bfloat16"] = _field(
        "auto",
        "Number format of the weights that train; auto is float32, or what method.adapter_dtype says; bfloat16 halves "
        "their memory, rounding each update.",
    )
    device: Name = _field("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    checkpoint_activations: Literal["auto", "attention", "mlp"] | Bool | Annotated[int, Strict(), Field(ge=2)] = _field(
        "auto",
        "Compute activations again in the backward pass: true saves most for a third more time; N in every N-th block, "
        "attention or mlp in that part of each; auto turns it on when memory runs out.",
    )
    offload_activations: Bool = _field(
        False, "Keep what the backward pass needs in the host's memory: a GPU then takes longer rows, copies cost time."
    )
    offload_optimizer: Bool = _field(
        False, "Keep the optimizer's averages in the host's memory: 8 bytes less for each trained weight on the GPU."
    )
    memory: Literal["auto"] | Amount = _field(
        "auto",
        "What the run may take on its device, such as 24GB: microbatches, and if need be recomputed activations, are "
        "chosen to fit; auto: what is free on a GPU, no limit on a CPU.",
        unit="bytes",
    )
    threads: Literal["auto"] | Annotated[int, Strict(), Field(ge=1, le=4096)] = _field(
        "auto", "CPU threads; part of a checkpoint, because it changes the order of sums.", unit="threads"
    )


class EvaluateSection(Section):
    """When held-out rows are scored during training, and what is kept."""

    every: Int | None = _field(
        None, "Steps between evaluations; default: at each checkpoint and at the end.", unit="steps", gt=0
    )
    on: tuple[DataSource, ...] | None = _field(None, "File to score, where data.eval holds nothing out.")
    keep_best: Literal["eval_loss"] | None = _field(
        "eval_loss", "Which number picks the checkpoint that becomes the adapter; null takes the last."
    )


class Recipe(Section):
    """What to tune, on what, how: the same tree in YAML, on the command line and in Python."""

    model: ModelSection = _field(..., "The base model: a path, or a mapping.")
    data: DataSection = _field(..., "The rows: a file, or a mapping.")
    method: dict[str, Any] = _field({"name": "lora"}, "How weights change: a name, or a mapping with its fields.")
    objective: dict[str, Any] = _field({"name": "sft"}, "What is minimised: a name, or a mapping with its fields.")
    regularizers: tuple[dict[str, Any], ...] = _field(
        (), "What rides beside: noise on the embeddings, pulls to the start. Names, or mappings with their fields."
    )
    train: TrainSection = _field(TrainSection(), "How long, how fast, in what batches.")
    engine: EngineSection = _field(EngineSection(), "Where the work runs.")
    evaluate: EvaluateSection = _field(EvaluateSection(), "When held-out rows are scored.")
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = _field(
        (), "Loggers that read the journal besides the files of the run."
    )
    output_dir: Name = _field(
        "runs/run", "Directory of the run; from a file, the default is runs/<name of the recipe>."
    )

    def __init__(self, **sections: Any) -> None:
        data, errors = checked(sections)
        raise_all(errors)
        try:
            super().__init__(**data)
        except ValidationError as error:  # the schema is checked first, so this is a hole in it: still in words
            raise_all([RecipeError(str(e["msg"]), where=".".join(map(str, e["loc"])), value=e["input"])
                       for e in error.errors()])  # fmt: skip

    def resolved(self) -> dict[str, Any]:
        """Plain data (dict, list, str, numbers, None), every default written out; reads back to an equal recipe."""
        return self.model_dump(mode="json")
