"""The reward model: limits, margins, metrics, and one batch against TRL's RewardTrainer, adapters both ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.objective import Scored
from luthier.contracts.record import Sample, Source
from luthier.data.collate import collate
from luthier.data.encode import Encoder
from luthier.data.formats import preference
from luthier.data.template import open_template
from luthier.methods.lora import LoRA
from luthier.models.load import Loaded, load_model, save_whole
from luthier.models.peft_names import live
from luthier.models.probe import open_trunk
from luthier.objectives.reward import Reward, reward_loss
from luthier.recipe.recipe import DataSection, ModelSection
from objectives.rig import rows
from tiny import tiny, tiny_tokenizer

LOG2 = math.log(2.0)


def test_limits() -> None:
    zero_P, far_P = torch.zeros(3), torch.full((3,), 40.0)
    assert reward_loss(zero_P, zero_P).tolist() == pytest.approx([LOG2] * 3)
    assert float(reward_loss(far_P, -far_P).max()) < 1e-30
    assert reward_loss(-far_P, far_P).tolist() == pytest.approx([80.0] * 3)  # linear where it is wrong, never infinite
    assert reward_loss(far_P, far_P, center=0.01).tolist() == pytest.approx([LOG2 + 64.0] * 3)


def test_a_margin_is_a_pair_s_own() -> None:
    margin_P = torch.tensor([0.5, math.nan, 0.0])
    chosen_P = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    found_P = reward_loss(chosen_P, torch.zeros(3), margin_P)
    assert found_P.tolist() == pytest.approx([math.log1p(math.exp(-0.5)), *[math.log1p(math.exp(-1.0))] * 2])
    found_P.sum().backward()
    assert torch.isfinite(chosen_P.grad).all()


def test_metrics_are_sums_over_pairs() -> None:
    batch = collate(rows("Pair", 3, (1.0,)))
    scores_Q = torch.tensor([2.0, 1.0, -1.0, 3.0, 0.5, 0.5])
    found = Reward().loss(Scored(torch.empty(0), scores_Q=scores_Q), batch, None).metrics
    assert found["rewards/accuracies"] == (1.0, 3.0)  # a tie is not ranked right
    assert found["rewards/margins"] == (-3.0, 3.0)
    assert found["rewards/chosen"] == (1.5, 3.0)
    assert found["rewards/rejected"] == (4.5, 3.0)


def test_rows_that_are_no_pairs_and_values_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(DataError, match="not a pair"):
        Reward().weight(collate(rows("Chat", 2, (1.0,))))
    assert Reward().weight(collate(rows("Pair", 4, (1.0,)))) == 4.0
    for value in (-0.1, math.inf, True, "much"):
        with pytest.raises(RecipeError, match="center_rewards_coefficient"):
            Reward(center_rewards_coefficient=value)


# ------------------------------------------------------------------ parity with the named oracle


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whole(tiny("llama", seed=3), tiny_tokenizer(), None, tmp_path_factory.mktemp("reward") / "base")


@pytest.fixture(scope="module")
def trainer_of(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Sample], bool, Any], Any]:
    """TRL's trainer over the ids of our samples, LoRA on all linears with B not zero."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    def make(samples: list[Sample], with_margin: bool, center: float | None) -> Any:
        columns: dict[str, list[Any]] = {"chosen_ids": [], "rejected_ids": []}
        for sample in samples:
            for name, place in zip(columns, sample.sequences, strict=True):
                columns[name].append([*sample.pieces[0].tokens, *sample.pieces[place].tokens])
        if with_margin:
            columns["margin"] = [sample.extra["margin"][0] for sample in samples]
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        arguments = trl.RewardConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), report_to=[], use_cpu=True, bf16=False, max_length=None,
            center_rewards_coefficient=center, per_device_train_batch_size=len(samples), gradient_checkpointing=False,
        )  # fmt: skip
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules="all-linear",
                               init_lora_weights=False, modules_to_save=["score"])  # fmt: skip
        return trl.RewardTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tiny_tokenizer(),
            peft_config=lora,
        )  # fmt: skip

    return make


ROWS = {
    "messages": {
        "prompt": [{"role": "user", "content": "Capital of France?"}],
        "chosen": [{"role": "assistant", "content": "Paris."}],
        "rejected": [{"role": "assistant", "content": "Lyon, I say."}],
    },
    "texts": {"prompt": "Capital of France? ", "chosen": "Paris.", "rejected": "Lyon."},  # TRL appends the eos
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", ROWS)
def test_the_ids_of_a_row_are_those_of_trl(shape: str, base: Path, tmp_path: Path) -> None:
    """Prompt and answer as one path, up to the very token that the score is read at."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer, model = tiny_tokenizer(), ours(base).model
    arguments = trl.RewardConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    rows_of_trl = Dataset.from_list([ROWS[shape]])
    trainer = trl.RewardTrainer(model=model, args=arguments, train_dataset=rows_of_trl, processing_class=tokenizer)
    encoder = Encoder(tokenizer, open_template(None, tokenizer), DataSection(train=({"path": "-"},)), (260,))
    (sample,) = encoder.samples(preference.read(ROWS[shape], Source("row", 1)))
    for name, place in zip(("chosen_ids", "rejected_ids"), sample.sequences, strict=True):
        ids = [int(token) for piece in (0, place) for token in sample.pieces[piece].tokens]
        assert ids == trainer.train_dataset[0][name]


def ours(base: Path) -> Loaded:
    return load_model(ModelSection(path=str(base)), dtype=torch.float32, reads="scores", head_seed=1)


def our_step(model: nn.Module, objective: Reward, samples: list[Sample]) -> tuple[float, dict[str, Tensor]]:
    trunk = open_trunk(model)
    batch = collate(samples)
    loss = objective.loss(Scored(torch.empty(0), scores_Q=trunk.scores(batch)), batch, None).total
    loss = loss / objective.weight(batch)
    trained = {name: tensor for name, tensor in live(model).items() if tensor.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    trunk.close()
    return float(loss.detach()), dict(zip(trained, gradients, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("with_margin", "center"), [(False, None), (True, None), (False, 0.01), (True, 0.1)])
def test_loss_and_gradients_are_those_of_trl(
    with_margin: bool, center: float | None, base: Path, trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    samples = rows("Pair", 5, (1.0,))
    if not with_margin:
        samples = [Sample(s.pieces, s.source, s.id, s.sequences) for s in samples]
    trainer = trainer_of(samples, with_margin, center)
    theirs = trainer.model
    theirs.eval()
    trainer._metrics["eval"].clear()
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(samples))])
    loss = trainer.compute_loss(theirs, inputs)
    loss.backward()
    theirs.save_pretrained(tmp_path / "theirs")

    model = ours(base).model
    load_adapter(tmp_path / "theirs", model)
    found, gradients = our_step(model, Reward(center_rewards_coefficient=center), samples)
    assert found == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = {name.replace(".default", "").replace(".modules_to_save", ""): p.grad
                for name, p in theirs.named_parameters() if p.grad is not None}  # fmt: skip
    assert len(gradients) == 29 and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
        assert float(gradient.abs().max()) > 0


@pytest.mark.filterwarnings("ignore")
def test_adapters_go_both_ways(base: Path, trainer_of: Callable[..., Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    samples = rows("Pair", 3, (1.0,))
    batch = collate(samples)
    texts = [[*s.pieces[0].tokens, *s.pieces[place].tokens] for s in samples for place in s.sequences]

    def scores_of(model: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in texts])

    theirs = trainer_of(samples, True, None).model
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = ours(base)
    method = load_adapter(tmp_path / "theirs", loaded.model)
    trunk = open_trunk(loaded.model)
    torch.testing.assert_close(trunk.scores(batch), scores_of(theirs), rtol=1e-5, atol=1e-5)
    trunk.close()

    save_adapter(tmp_path / "ours", method, loaded.model, base_path=str(base))
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert written.keys() == load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    torch.manual_seed(99)  # PEFT's own new head is another: the saved one must win
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    back = PeftModel.from_pretrained(plain, tmp_path / "ours")
    assert back.peft_config["default"].task_type == "SEQ_CLS"
    torch.testing.assert_close(scores_of(back), scores_of(theirs), rtol=1e-5, atol=1e-6)


def test_lora_leaves_the_head_to_its_copy(base: Path) -> None:
    loaded = ours(base)
    before = loaded.model.score.weight.detach().clone()
    method = LoRA(r=4)
    method.attach(loaded.model)
    trained = {name for name, tensor in live(loaded.model).items() if tensor.requires_grad}
    assert "base_model.model.score.weight" in trained and not any("score.lora" in name for name in trained)
    with torch.no_grad():
        loaded.model.score.copy.weight.add_(1.0)
    with method.off(loaded.model):
        assert torch.equal(loaded.model.score.weight, before)
    assert torch.equal(loaded.model.score.weight, before + 1.0)
    assert method.config(loaded.model)["modules_to_save"] == ["score"]
    assert method.config(loaded.model)["task_type"] == "SEQ_CLS"
