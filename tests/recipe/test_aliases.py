"""Names of other trainers: read as ours with a note, refused with the way out, never doubled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.contracts.errors import LuthierError
from luthier.recipe.aliases import PEERS, peers_of
from luthier.recipe.fingerprint import flat
from luthier.recipe.read import read_recipe
from luthier.recipe.recipe import Recipe
from luthier.recipe.schema import paths

LLAMA_FACTORY = """
model_name_or_path: m
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
dataset: a.jsonl,b.jsonl
cutoff_len: 512
overwrite_cache: true
output_dir: out
logging_steps: 10
save_steps: 50
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_steps: 25
"""
AXOLOTL = """
base_model: m
datasets: a.jsonl
val_set_size: 0.05
adapter: lora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 1024
sample_packing: true
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_torch
lr_scheduler: constant_with_warmup
learning_rate: 0.0002
gradient_checkpointing: true
train_on_inputs: false
"""


def got(tmp_path: Path, text: str, *overrides: str) -> tuple[dict[str, Any], list[str]]:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    recipe, notes = read_recipe(str(path), overrides)
    return dict(flat(recipe)), notes


def test_a_llama_factory_file(tmp_path: Path) -> None:
    fields, notes = got(tmp_path, LLAMA_FACTORY)
    assert {
        "model.path": "m", "method.name": "lora", "method.r": 8, "method.target_modules": ["q_proj", "v_proj"],
        "data.max_tokens": 512, "data.eval": 0.1, "train.rows_per_step": 8, "train.tokens_per_step": None,
        "train.learning_rate": 1e-4, "train.epochs": 3.0, "train.schedule": "cosine", "train.warmup_ratio": 0.1,
        "train.save_every": 50, "evaluate.every": 25, "engine.precision": "bf16", "objective.name": "sft",
        "output_dir": "out",
    }.items() <= fields.items()  # fmt: skip
    assert [source["path"] for source in fields["data.train"]] == ["a.jsonl", "b.jsonl"]
    assert (
        len(notes) == len(LLAMA_FACTORY.split("\n")) - 2 - 1 - 1
    )  # one for each line, two make the batch, one is ours
    assert any("`cutoff_len: 512` is read as `data.max_tokens: 512`" in note and ":9:1" in note for note in notes)


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("fp16: true", "engine.precision", "fp16"), ("fp16: false", "engine.precision", "auto"),
        ("bf16: false\nfp16: true", "engine.precision", "fp16"),
        ("bf16: true\nfp16: false", "engine.precision", "bf16"),
        ("engine: {precision: half}", "engine.precision", "fp16"),
        ("pure_bf16: true", "engine.trained_dtype", "bfloat16"),
        ("engine: {trained_dtype: bf16}", "engine.trained_dtype", "bfloat16"),
    ],
)  # fmt: skip
def test_number_formats_by_their_other_names(tmp_path: Path, line: str, path: str, value: str) -> None:
    fields, _ = got(tmp_path, f"model: m\ndata: x\n{line}\n")
    assert fields[path] == value


def test_an_axolotl_file(tmp_path: Path) -> None:
    fields, _ = got(tmp_path, AXOLOTL)
    assert {
        "method.name": "lora", "method.r": 32, "method.lora_alpha": 16, "method.lora_dropout": 0.05,
        "method.target_modules": "all-linear", "data.packing": "forest", "train.rows_per_step": 2,
        "train.optimizer": "adamw", "train.schedule": "constant", "engine.checkpoint_activations": True,
        "data.mask.roles": ["assistant"], "data.eval": 0.05,
    }.items() <= fields.items()  # fmt: skip


def test_a_peer_name_inside_its_section(tmp_path: Path) -> None:
    text = (
        "model: m\ndata: {train: x, cutoff_len: 64, mask: {train_on_inputs: true}}\nmethod: {name: lora, lora_r: 4}\n"
    )
    fields, notes = got(tmp_path, text, "train.num_train_epochs=2", "lr=1e-3")
    assert (fields["data.max_tokens"], fields["method.r"]) == (64, 4)
    assert (fields["train.epochs"], fields["train.learning_rate"]) == (2, 1e-3)
    assert fields["data.mask.roles"] == ["system", "user", "assistant"]
    assert len(notes) == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stage: dpo\npref_beta: 0.2\npref_loss: hinge\n", {"name": "dpo", "beta": 0.2, "loss_type": "hinge"}),
        ("rl: kto\nrl_beta: 0.3\nkto_desirable_weight: 1.5\n",
         {"name": "kto", "beta": 0.3, "desirable_weight": 1.5}),
        ("objective: dpo\nbeta: 0.3\nprecompute_ref_log_probs: true\nloss_type: [sigmoid, sft]\n",
         {"name": "dpo", "beta": 0.3, "reference": "cached", "loss_type": ["sigmoid", "sft"]}),
        ("rlhf_type: cpo\nloss_type: simpo\ncpo_alpha: 0\nsimpo_gamma: 1\n",
         {"name": "cpo", "loss_type": "simpo", "cpo_alpha": 0, "simpo_gamma": 1}),
        ("stage: rm\n", {"name": "reward"}),
        ("rl: orpo\norpo_alpha: 0.4\n", {"name": "orpo", "beta": 0.4}),
    ],
)  # fmt: skip
def test_objectives_of_peers(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    fields, _ = got(tmp_path, "model: m\ndata: x\n" + text)
    assert {f"objective.{name}": value for name, value in expected.items()}.items() <= fields.items()


def test_an_override_wins_over_a_peer_name_in_the_file(tmp_path: Path) -> None:
    fields, _ = got(tmp_path, "model: m\ndata: x\ncutoff_len: 64\n", "data.max_tokens=32")
    assert fields["data.max_tokens"] == 32
    fields, _ = got(tmp_path, "model: m\ndata: {train: x, max_tokens: 64}\n", "cutoff_len=16")
    assert fields["data.max_tokens"] == 16


def test_qlora_is_lora_on_nf4(tmp_path: Path) -> None:
    fields, notes = got(tmp_path, "model: m\ndata: x\nmethod: {name: qlora, r: 8}\n")
    assert (fields["method.name"], fields["model.quantization"], fields["method.r"]) == ("lora", "nf4", 8)
    assert "qlora" in notes[0]
    assert Recipe(model="m", data="x", method="qlora").model.quantization == "nf4"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cutoff_len: 16\nmax_length: 32\n", ["`max_length`", "`data.max_tokens`", "twice", ":4:1", ":3:1"]),
        ("learning_rate: 1\ntrain: {learning_rate: 1}\n", ["twice", ":3:1", ":4:9"]),
        ("method: lora\nadapter: lora\n", ["twice", "method.name"]),
        ("gradient_accumulation_steps: 4\n", ["says no batch", "train.rows_per_step"]),
        ("per_device_train_batch_size: 2\nmicro_batch_size: 2\n", ["twice"]),
        ("per_device_train_batch_size: two\n", ["no number of rows"]),
        ("per_device_train_batch_size: 2\ntrain: {rows_per_step: 2}\n", ["twice", "rows_per_step"]),
        ("warmup_steps: 10\n", ["train.warmup_ratio"]),
        ("trust_remote_code: true\n", ["never run"]),
        ("cutoff_len: long\n", ["`data.max_tokens` takes a whole number", ":3:13"]),
        ("method: qlora\nload_in_8bit: true\n", ["qlora means"]),
        ("rl: ipo\n", ["loss_type: ipo", ":3:1"]),
        ("pref_loss: simpo\n", ["objective: simpo", ":3:1"]),
        ("objective: {name: dpo, pref_loss: kto_pair}\n", ["objective: kto reads pairs too"]),
        ("rl: dpo\nrpo_alpha: 0.5\n", ["loss_weights: [1.0, it]", ":4:1"]),
        ("objective: simpo\nsimpo_gamma: 0.5\n", ["unknown field `objective.simpo_gamma`", "did you mean `gamma`?"]),
        ("objective: dpo\nref_model: other\n", ["the base that the run starts from"]),
        ("wat: 1\n", ["unknown field `wat`"]),
        ("optim: sgd9\n", ["`train.optimizer` takes adafactor | adamw", "saw sgd9", "did you mean `sgd`?"]),
    ],
)
def test_conflicts_and_refusals(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(LuthierError) as caught:
        got(tmp_path, "model: m\ndata: x\n" + text)
    line = caught.value.line()
    assert "\n" not in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("adamw_bnb_8bit", "adamw_8bit"), ("paged_adamw_32bit", "paged_adamw"), ("lion_32bit", "lion"), ("sgd", "sgd"),
     ("paged_adamw_8bit", "paged_adamw_8bit"), ("adafactor", "adafactor"), ("adamw_torch_fused", "adamw")],
)  # fmt: skip
def test_optimizers_of_peers(tmp_path: Path, theirs: str, ours: str) -> None:
    assert got(tmp_path, f"model: m\ndata: x\noptim: {theirs}\n")[0]["train.optimizer"] == ours


def test_every_target_is_a_field() -> None:
    known = set(paths()) | {path.replace(".lora.", ".") for path in paths()}
    known |= {".".join(path.split(".")[::2]) for path in paths() if path.startswith("objective.")}
    missing = {
        name: target for name, (target, _) in PEERS.items() if target not in known | {"method.name", "objective.name"}
    }
    assert missing == {}


def test_explain_knows_the_names_elsewhere() -> None:
    assert {"cutoff_len", "max_seq_length"} <= set(peers_of("data.max_tokens"))
    assert "x" in peers_of("train.rows_per_step")[-1]
