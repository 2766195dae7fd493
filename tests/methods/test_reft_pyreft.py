"""ReFT against pyreft 0.1.0 (files made by tests/golden/make_pyreft.py): every intervention class with its gradients, a
whole model edited at places of its prompts, the rule of places, and names of files. Tolerance 1e-5 / 1e-4 in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from luthier.contracts.errors import ModelError
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.collate import collate
from luthier.methods.loreft import LoReFT
from luthier.models.probe import open_trunk
from luthier.models.prompt_edges import parse_positions
from luthier.models.reft import Intervention, from_pyreft, to_pyreft

GOLDEN = Path(__file__).parents[1] / "golden" / "pyreft"
CASES = ["loreft-linear", "noreft-linear", "consreft-linear", "direft-linear", "nodireft-linear", "lobireft-linear"]
CASES += ["loreft-tanh", "direft-gelu", "noreft-relu"]


def same_numbers(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def golden(name: str) -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / "interventions.safetensors")
    return {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


def ours(name: str, tensors: dict[str, Tensor]) -> Intervention:
    kind, _, act = name.partition("-")
    made = Intervention(kind, *tensors["R"].shape, torch.device("cpu"))
    made.act = act
    with torch.no_grad():
        for own, parameter in made.named_parameters():
            parameter.copy_(tensors[own])
    return made


def through_householder(grad_RD: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """A gradient of R pushed to the coordinates that pyreft trains."""
    holder = nn.Module()
    holder.weight = nn.Parameter(tensors["R"].T.contiguous())
    orthogonal(holder)
    with torch.no_grad():
        holder.parametrizations.weight[0].base.copy_(tensors["basis"])
        holder.parametrizations.weight.original.copy_(tensors["coordinates"])
    same_numbers(holder.weight.detach(), tensors["R"].T)
    return torch.autograd.grad(holder.weight, holder.parametrizations.weight.original, grad_RD.T.contiguous())[0]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_theirs(name: str) -> None:
    tensors = golden(name)
    made, h = ours(name, tensors), tensors["h"].clone().requires_grad_(True)
    output = made(h)
    same_numbers(output, tensors["output"])
    (output * tensors["slope"]).sum().backward()
    same_numbers(h.grad, tensors["grad.h"])
    for own, parameter in made.named_parameters():
        if own == "R" and "coordinates" in tensors:
            same_numbers(through_householder(parameter.grad, tensors), tensors["grad.coordinates"])
        else:
            same_numbers(parameter.grad, tensors[f"grad.{own}"])


def test_their_matrix_is_orthonormal_and_gets_some_gradient() -> None:
    tensors = golden("loreft-linear")
    same_numbers(tensors["R"] @ tensors["R"].T, torch.eye(3))
    assert tensors["grad.coordinates"].abs().max() > 0.1


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    return load_file(GOLDEN / "model.safetensors")


def edited(whole: dict[str, Tensor]) -> nn.Module:
    """The model of the golden file with our sites, their tensors loaded."""
    state = {key.removeprefix("base."): value for key, value in whole.items() if key.startswith("base.")}
    width, vocabulary = state["model.norm.weight"].numel(), state["lm_head.weight"].shape[0]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    method = LoReFT(r=3, positions="f3+l2")
    method.attach(model)
    stem = "base_model.model.model.layers"
    given = {f"{stem}.{k.removeprefix('adapter.')}": v for k, v in whole.items() if k.startswith("adapter.")}
    method.load(model, given)
    return model


@pytest.mark.parametrize("attention", ["forest", "unpacked"])
def test_a_packed_model_gives_their_logits(whole: dict[str, Tensor], attention: str) -> None:
    model, tokens, prompt = edited(whole), whole["tokens"], int(whole["prompt"])
    samples = [
        Sample((Piece(row, [0.0] * prompt + [1.0] * (len(row) - prompt)),), Source("rows.jsonl", i + 1), id=i)
        for i, row in enumerate(tokens.tolist())
    ]
    with torch.no_grad():
        found = open_trunk(model, attention=attention).logits(collate(samples))
    same_numbers(found, whole["logits"][:, prompt - 1 : -1].flatten(0, 1))


def test_a_cached_native_pass_gives_their_logits(whole: dict[str, Tensor]) -> None:
    """The pass over the prompt is edited, what follows it is not."""
    model, tokens, prompt, cache = edited(whole), whole["tokens"], int(whole["prompt"]), DynamicCache()
    with torch.no_grad():
        found = [model(input_ids=tokens[:, :prompt], past_key_values=cache).logits]
        found += [model(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, 13)]
    same_numbers(torch.cat(found, 1), whole["logits"])


def test_places_are_theirs_on_prompts_that_hold_them() -> None:
    compared = 0
    for case in json.loads((GOLDEN / "locations.json").read_text("utf-8")):
        edges, prompt = parse_positions(case["positions"]), case["prompt"]
        p, q = edges.of(prompt)
        mine = [rows for rows in (list(range(p)), list(range(prompt - q, prompt))) if rows]
        if prompt >= 2 * max(edges.first, edges.last):
            assert mine == case["rows"], case
            compared += 1
        else:  # a short one: ours may edit one token more, never another
            assert all(set(some) <= {row for rows in mine for row in rows} for some in case["rows"]), case
    assert compared >= 15


def test_files_have_their_names_and_states(whole: dict[str, Tensor]) -> None:
    tensors = {key: value for key, value in whole.items() if key.startswith("adapter.")}
    states = to_pyreft(tensors)
    assert set(states) == set(json.loads((GOLDEN / "keys.json").read_text("utf-8")))
    back = from_pyreft(states, "adapter", ("prefix", "suffix"))
    assert set(back) == set(tensors)
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_a_state_is_the_one_that_they_save() -> None:
    tensors = golden("loreft-linear")
    (state,) = to_pyreft({f"layers.0.prefix.{kind}": tensors[kind] for kind in ("R", "W", "b")}).values()
    saved = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    assert set(state) == set(saved)
    assert all(torch.equal(state[key], saved[key]) for key in saved)


def test_other_states_are_refused() -> None:
    with pytest.raises(ModelError, match="loreft"):
        from_pyreft({"layer_0_comp_block_output_unit_pos_nunit_1#0": {"weight": torch.ones(1)}}, "x", ("prefix",))
    with pytest.raises(ModelError, match="ReFT"):
        to_pyreft({"layers.0.lora_A.weight": torch.ones(1)})
