"""What a plan needs to know of a model, exact from config.json alone: the model is built on torch's meta device.

transformers' own class counts better than any formula here could (biases, tied heads, gated and plain MLPs, experts,
norms inside attention), allocates nothing and takes a second for 70 billion parameters. A method is then attached to
that model as it would be to the real one, so that what trains is counted by the method's own code.

`Form` is what the activations follow from. `known`: a decoder whose layers are norm, q/k/v/o projections, norm and a
gated MLP, the form that the predictions are measured on; others are planned as if they were, and the plan says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from luthier.contracts.errors import ModelError
from luthier.models.shapes import Shapes, shapes_of

_LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_GELU_NEW = 4  # x, x / 2, tanh and 1 + tanh, operation by operation


@dataclass(frozen=True, slots=True)
class Form:
    """Widths of one decoder layer, in elements for each token."""

    layers: int
    width: int
    heads: int
    queries: int  # heads times their width
    keys: int  # the same of keys (and of values)
    head_width: int
    ffn: int  # of an MoE: of the experts that one token visits, together
    gated: bool
    head_norms: bool  # norms of queries and keys
    vocabulary: int
    tied: bool
    known: bool
    mlp_kept: int = 1  # of a plain MLP: tensors of its width that the activation keeps
    attention_dropout: bool = False  # scores are then made and kept
    dropout: bool = False  # of the residual stream: two masks for each layer


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Elements of a model by what happens to them."""

    family: str
    form: Form
    parameters: int
    linears: int  # weights of the body's linears: what a storage format packs
    linear_rows: int  # their output rows, for formats with a scale for each row
    largest_linear: int
    uncovered: int  # matrices in no linear, embedding or head: experts kept as one parameter

    @property
    def rest(self) -> int:
        """Embedding, head, norms, biases and what no format packs."""
        return self.parameters - self.linears


def blank_model(config: Any, reads: str = "logprobs") -> nn.Module:
    """The model of a configuration on the meta device; a tied head is tied."""
    kind: Any = AutoModelForCausalLM if reads == "logprobs" else AutoModelForSequenceClassification
    if reads == "scores":
        config.num_labels = 1
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = kind.from_config(config)
            model.tie_weights()  # type: ignore[operator]
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ModelError(f"transformers cannot build it: {said}", where="config.json",
                         value=getattr(config, "model_type", None)) from error  # fmt: skip
    finally:
        transformers_logging.set_verbosity(level)
    return model


def config_of(words: Mapping[str, Any]) -> Any:
    """A transformers configuration from the words of a config.json."""
    if not isinstance(words, Mapping):
        raise ModelError("a configuration is an object of fields", where="config.json", value=type(words).__name__)
    kind, given = words.get("model_type"), {key: value for key, value in words.items() if key != "model_type"}
    if kind not in CONFIG_MAPPING:
        raise ModelError("not a model that transformers knows", where="config.json", value=kind or "no model_type",
                         remedy="look at its model_type")  # fmt: skip
    try:
        return AutoConfig.for_model(kind, **given)
    except Exception as error:  # each family checks its fields in its own way
        said = " ".join(str(error).split())[:200]
        raise ModelError(f"transformers cannot read it: {said}", where="config.json", value=kind) from error


def read_shape(model: nn.Module) -> ModelShape:
    """Before a method is attached."""
    shapes = shapes_of(model)
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    weights = [linear.in_features * linear.out_features for linear in shapes.linears]
    return ModelShape(
        family=str(config.model_type), form=_form(text, model, shapes), parameters=shapes.parameters,
        linears=sum(weights), linear_rows=sum(linear.out_features for linear in shapes.linears),
        largest_linear=max(weights, default=0), uncovered=sum(count for _, count in shapes.uncovered),
    )  # fmt: skip


def _form(text: Any, model: nn.Module, shapes: Shapes) -> Form:
    width = _number(text, "hidden_size", "n_embd", "d_model")
    heads = _number(text, "num_attention_heads", "n_head") or 1
    head_width = _number(text, "head_dim") or width // heads
    layer = f"{shapes.layers[-1]}." if shapes.layers else ""
    mine = {linear.path.removeprefix(layer): linear for linear in shapes.linears if linear.path.startswith(layer)}
    names = {path.rpartition(".")[2] for path in mine}
    gated = "gate_proj" in names or "gate_up_proj" in names or "experts" in str(sorted(names))
    norms = {name.rpartition(".")[2] for name, _ in model.named_modules() if name.startswith(layer)}
    experts = _number(text, "num_experts_per_tok", "num_experts_per_token")
    ffn = _number(text, "intermediate_size", "n_inner", "ffn_dim") or 4 * width
    if experts:
        ffn = experts * (_number(text, "moe_intermediate_size") or ffn)
    return Form(
        layers=len(shapes.layers), width=width, heads=heads, queries=heads * head_width,
        keys=(_number(text, "num_key_value_heads") or heads) * head_width, head_width=head_width, ffn=ffn,
        gated=gated or bool(experts), head_norms={"q_norm", "k_norm"} <= norms,
        vocabulary=_number(text, "vocab_size"), tied=shapes.tied, known=names == _LLAMA and not experts,
        mlp_kept=_GELU_NEW if getattr(text, "activation_function", "") == "gelu_new" else 1,
        attention_dropout=_share(text, "attention_dropout", "attn_pdrop"),
        dropout=_share(text, "resid_pdrop", "hidden_dropout", "resid_dropout"),
    )  # fmt: skip


def _share(text: Any, *names: str) -> bool:
    return any(getattr(text, name, 0.0) for name in names)


def _number(text: Any, *names: str) -> int:
    """The first of these that a configuration has; 0 where none."""
    found = (getattr(text, name, None) for name in names)
    return next((int(value) for value in found if isinstance(value, int) and value), 0)
