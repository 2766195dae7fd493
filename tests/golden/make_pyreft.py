"""Makes tests/golden/pyreft/ with pyreft itself: `python make_pyreft.py`, with pyreft and pyvene importable.

    pip download pyreft==0.1.0 pyvene==0.1.8 --no-deps; unzip both somewhere; PYTHONPATH=somewhere python make_pyreft.py

interventions.safetensors: of each intervention class, on random hidden rows and with given weights, its output and the
gradients of sum(output * slope): for h, W and b as they are, for R as the gradient of the Householder coordinates that
pyreft trains (beside the D x D basis, so that a test can push another gradient of R through the same map), and the
saved state where the class has its own. model.safetensors: logits of a two-layer Llama (weights in the file) whose
decoder layers pyreft intervenes on at given places of two prompts, as ReftModel runs it.
locations.json, keys.json: what get_intervention_locations answers, and the names of that model's files.
Left out: dropout (pyreft drops the hidden state itself).
"""

from __future__ import annotations

import json
from pathlib import Path

import pyreft.interventions as theirs
import pyvene
import torch
from pyreft.dataset import get_intervention_locations
from pyreft.reft_model import ReftModel
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "pyreft"
WIDTH, RANK, ROWS = 24, 3, 10
CLASSES = {
    "loreft": theirs.LoreftIntervention, "noreft": theirs.NoreftIntervention, "consreft": theirs.ConsreftIntervention,
    "direft": theirs.DireftIntervention, "nodireft": theirs.NodireftIntervention,
    "lobireft": theirs.LobireftIntervention,
}  # fmt: skip
CASES = [(name, None) for name in CLASSES] + [("loreft", "tanh"), ("direft", "gelu"), ("noreft", "relu")]


def intervention(kind: str, act: str | None, width: int = WIDTH) -> torch.nn.Module:
    made = CLASSES[kind](
        embed_dim=width, low_rank_dimension=RANK, dtype=torch.float32, act_fn=act, dropout=0.0, add_bias=False
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape)  # of coordinates the part below the diagonal: the diagonal is
            parameter.add_(noise.tril(-1) if name.endswith("original") else noise)  # read as whole numbers, -1 or 1
    return made


def weights(made: torch.nn.Module) -> dict[str, torch.Tensor]:
    """R (r, D), W, b in our names; the very tensors where they are leaves."""
    found = {"R": made.rotate_layer.weight.T if hasattr(made, "rotate_layer") else made.proj_layer.weight}
    if isinstance(made.learned_source, torch.nn.Linear):
        return {**found, "W": made.learned_source.weight, "b": made.learned_source.bias}
    return {**found, "b": made.learned_source}


def one_class(name: str, act: str | None) -> dict[str, torch.Tensor]:
    made = intervention(name, act)
    h, slope = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(ROWS, WIDTH)
    output = made(h)
    (output * slope).sum().backward()
    own = weights(made)
    found = {"h": h, "slope": slope, "output": output, "grad.h": h.grad, **own}
    found |= {f"grad.{kind}": own[kind].grad for kind in ("W", "b") if kind in own}
    if hasattr(made, "rotate_layer"):
        map_ = made.rotate_layer.parametrizations.weight
        found |= {"coordinates": map_.original, "basis": map_[0].base, "grad.coordinates": map_.original.grad}
    else:
        found["grad.R"] = made.proj_layer.weight.grad
    if name == "loreft":  # the others save their coordinates and the whole basis
        found |= {f"state.{key}": value for key, value in made.state_dict().items()}
    return found


def whole_model() -> dict[str, torch.Tensor]:
    """Two prompts of one length, two layers, f3+l2, one intervention for each end of each layer's prompt."""
    config = LlamaConfig(
        vocab_size=60, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    layers = [0, 1, 0, 1]  # the first half edits the first tokens, the second half the last ones
    made = [intervention("loreft", None) for _ in layers]
    representations = [
        {"layer": layer, "component": "block_output", "low_rank_dimension": RANK, "intervention": one}
        for layer, one in zip(layers, made, strict=True)
    ]
    reft = ReftModel(pyvene.IntervenableConfig(representations=representations, model_type=type(model)), model)
    tokens, prompt = torch.randint(0, 60, (2, 13)), 9
    found = {f"base.{name}": value for name, value in model.state_dict().items()}
    places = get_intervention_locations(last_position=prompt, positions="f3+l2", num_interventions=4, pad_mode="last")
    units = [[[row for row in one if row < prompt]] * 2 for one in places]  # pads point behind the prompt
    _, out = reft({"input_ids": tokens}, unit_locations={"sources->base": (None, units)})
    found |= {"tokens": tokens, "prompt": torch.tensor(prompt), "logits": out.logits}
    for layer, place, one in zip(layers, ("prefix", "prefix", "suffix", "suffix"), made, strict=True):
        found |= {f"adapter.{layer}.{place}.{name}": value for name, value in weights(one).items()}
    (HERE / "keys.json").write_text(json.dumps(list(reft.interventions)) + "\n")
    return found


def locations() -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for positions in ("f7+l7", "f3+l1", "f2+l5", "f3", "l4"):
        for prompt in (1, 2, 5, 8, 14, 15, 40):
            both = "+" in positions
            answer = get_intervention_locations(
                last_position=prompt, positions=positions, num_interventions=2 if both else 1, pad_mode="last"
            )
            rows = [[row for row in one if row < prompt] for one in answer]  # pads point behind the prompt
            found.append({"positions": positions, "prompt": prompt, "rows": rows})
    return found


def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, HERE / name)


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    torch.manual_seed(0)
    cases = {f"{name}-{act or 'linear'}": one_class(name, act) for name, act in CASES}
    write("interventions.safetensors", {f"{c}/{k}": v for c, tensors in cases.items() for k, v in tensors.items()})
    write("model.safetensors", whole_model())
    (HERE / "locations.json").write_text(json.dumps(locations()) + "\n")
