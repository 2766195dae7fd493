"""A recipe becomes a plan: the model's shape from config.json, what the method trains, what the rows run through it.

Nothing is loaded and nothing is written. The same functions plan a recipe before it runs (`run.plan`) and a run that
is about to begin, whose own account then holds prediction and measurement side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.contracts.objective import Objective
from luthier.engine.optimizer import check_together
from luthier.models.directory import find_directory, read_json, scan
from luthier.models.quantise import check_device
from luthier.models.weights.grouped import BITS
from luthier.planner import twin
from luthier.planner.formats import Stored
from luthier.planner.head import mode_of
from luthier.planner.load import Course
from luthier.planner.memory import Memory, Setting, memory_of
from luthier.planner.shape import ModelShape, blank_model, config_of, read_shape
from luthier.planner.trained import Trained
from luthier.recipe import resolve
from luthier.recipe.recipe import Recipe


@dataclass(frozen=True)
class Planned:
    """All that a plan is computed from; `memory` is its heart."""

    recipe: Recipe
    shape: ModelShape
    trained: Trained
    setting: Setting
    course: Course
    notes: tuple[str, ...]
    words: dict[str, Any] | None = None  # a configuration that stands in place of the model directory's

    @property
    def memory(self) -> Memory:
        return memory_of(self.shape, self.trained, self.setting, self.course)


Tokenize = Callable[[str], list[int]]


def plan_of(
    recipe: Recipe, course: Course, device: str, words: dict[str, Any] | None = None, tokenize: Tokenize | None = None
) -> Planned:
    """`device`: cpu or cuda. `words`: a configuration in place of the model directory's."""
    method: Method = resolve.build("methods", recipe.method)
    check_together(type(method), recipe.train.optimizer)
    if tokenize is not None:
        method = method.with_texts(tokenize)
    check_device(recipe.model.quantization, device)
    objective: Objective = resolve.build("objectives", recipe.objective)
    config = config_of(config_words(recipe) if words is None else words)
    shape = read_shape(blank_model(config, objective.reads))
    trained = twin.trained_by(method, config, objective.reads, course.loads[-1])
    said = config_words(recipe) if words is None else words
    stored = stored_of(recipe, said)
    if said.get("dtype", said.get("torch_dtype")) == "bfloat16" and not recipe.model.add_tokens:
        stored = replace(stored, tables=2)
    if trained.base_trained and stored.name != "none":
        raise RecipeError(
            "this method trains the base's own weights, which a quantised base does not have",
            where="model.quantization", value=stored.name, remedy="give a dense model and none, or use method: lora",
        )  # fmt: skip
    setting = setting_of(recipe, objective, trained, device, stored)
    return Planned(recipe, shape, trained, setting, course, tuple(_notes(shape, trained, setting, course)), words)


def config_words(recipe: Recipe) -> dict[str, Any]:
    """The config.json of the recipe's model."""
    directory = find_directory(recipe.model.path, recipe.model.revision)
    scan(directory)
    found: dict[str, Any] = read_json(directory / "config.json")
    return found


def stored_of(recipe: Recipe, words: dict[str, Any]) -> Stored:
    """How the body's linears lie: as the files have them packed already, else as the recipe asks."""
    said, double = words.get("quantization_config"), bool(getattr(recipe.model, "double_quantization", True))
    if not isinstance(said, dict):
        return Stored(recipe.model.quantization, double)
    if (method := said.get("quant_method")) in ("gptq", "awq"):
        bits, group = (said.get(name) for name in ("bits", "group_size"))  # what is no number is refused at the load
        return Stored(
            method, bits=bits if bits in BITS else 4, group=group if isinstance(group, int) and group else 128
        )
    return Stored("nf4" if said.get("load_in_4bit") else "int8", bool(said.get("bnb_4bit_use_double_quant")))


def setting_of(recipe: Recipe, objective: Objective, trained: Trained, device: str, stored: Stored) -> Setting:
    """The recipe's words in those of the planner."""
    precision = _precision(recipe, device)
    compute = 4 if precision == "fp32" else 2
    narrow = recipe.engine.trained_dtype == "bfloat16" or recipe.method.get("adapter_dtype") == "bf16"
    linear = type(objective).coefficients is not Objective.coefficients
    return Setting(
        device=device, stored=replace(stored, dense=compute), compute=compute,
        trained=2 if precision == "bf16" and narrow else 4,
        optimizer=recipe.train.optimizer, recompute_every=_recompute(recipe.engine.checkpoint_activations),
        recompute_part=_part(recipe.engine.checkpoint_activations),
        keeps_all=recipe.engine.checkpoint_activations is False,
        in_backward=recipe.train.optimizer_in_backward,
        head=mode_of(trained, reads=objective.reads, linear=linear),
    )  # fmt: skip


def _recompute(said: Any) -> int:
    """auto begins without and recomputes only when memory runs out."""
    return int(said) if isinstance(said, int) else 0


def _part(said: Any) -> str:
    return said if said in ("attention", "mlp") else ""


def _precision(recipe: Recipe, device: str) -> str:
    said = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(recipe.model.dtype, "auto")
    asked = recipe.engine.precision if recipe.engine.precision != "auto" else said
    narrow = recipe.engine.trained_dtype == "bfloat16"
    found = asked if asked != "auto" else "bf16" if device == "cuda" or narrow else "fp32"
    if narrow and found != "bf16":
        raise RecipeError("weights in bfloat16 train with products in bfloat16", where="engine.trained_dtype",
                          value=f"bfloat16, engine.precision {found}",
                          remedy="set engine.precision: bf16, or trained_dtype: float32")  # fmt: skip
    return found


def _notes(shape: ModelShape, trained: Trained, setting: Setting, course: Course) -> list[str]:
    """What the prediction rests on, where it is less than measured."""
    notes = []
    if not shape.form.known:
        notes.append(f"{shape.family}: activations are estimated by a form that was measured on other families")
    if trained.extra is not None:
        notes.append(
            "what this method keeps in a layer was rehearsed: its own code on two and three layers, no numbers"
        )
    elif not trained.measured:
        notes.append("the activations of this method are taken as LoRA's: not measured")
    if setting.device != "cpu":
        notes.append("GPU memory is predicted by the formulas that were measured on a CPU: not measured on a GPU")
    if setting.stored.name != "none" and setting.device != "cpu":
        notes.append(f"{setting.stored.name}: one dequantised matrix at a time is counted as workspace")
    if not course.from_rows:
        notes.append("rows were not read: full microbatches of rows of one length are assumed")
    return notes


def trained_by(section: dict[str, Any], recipe: Recipe, words: dict[str, Any]) -> Trained:
    """What another method would train in the same model."""
    objective: Objective = resolve.build("objectives", recipe.objective)
    return twin.trained_by(resolve.build("methods", section), config_of(words), objective.reads)


def on(planned: Planned, device: str) -> Planned:
    """The same plan on another kind of device."""
    objective: Objective = resolve.build("objectives", planned.recipe.objective)
    return replace(
        planned, setting=setting_of(planned.recipe, objective, planned.trained, device, planned.setting.stored)
    )
