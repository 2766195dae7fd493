"""AdaLoRA against PEFT (oracle only): masks over whole schedules, logits, gradients, penalty, runs, files, merge."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import LuthierError, NotMergeable, RecipeError
from luthier.methods.adalora import AdaLoRA
from luthier.models.peft_names import live
from luthier.models.rank_budget import Schedule, Triplets, allocate
from luthier.models.sites import sites
from methods.rig import TOKENS, base, logits, loss, stir, train

peft = pytest.importorskip("peft")
from peft.tuners.adalora.layer import RankAllocator

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = {"init_r": 6, "target_r": 3, "lora_alpha": 9, "orth_reg_weight": 0.5}
STEPS = 14
SCHEDULE = {"tinit": 3, "tfinal": 4, "total_step": STEPS}
CASES = {
    "all linears": ("llama", {"target_modules": "all-linear"}),
    "some": ("qwen2", {"target_modules": ["q_proj", "down_proj"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "head saved whole": ("llama", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}),
    "one layer": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
}
Case = tuple[str, dict[str, Any]]


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def theirs(case: Case, **changes: Any) -> nn.Module:
    options = {**FEW, **SCHEDULE, **case[1], **changes}
    return peft.get_peft_model(base(case[0]), peft.AdaLoraConfig(task_type="CAUSAL_LM", **options)).eval()


def ours(case: Case, **changes: Any) -> tuple[AdaLoRA, nn.Module]:
    method, model = AdaLoRA(**{**FEW, **SCHEDULE, **case[1], **changes}), base(case[0])
    method.attach(model)
    return method, model


def copied(case: Case, **changes: Any) -> tuple[AdaLoRA, nn.Module, nn.Module]:
    oracle = theirs(case, **changes)
    stir(oracle)
    method, model = ours(case, **changes)
    method.load(model, peft.get_peft_model_state_dict(oracle))
    return method, model, oracle


def test_same_trainables_logits_gradients_and_penalty(case: Case) -> None:
    method, model, oracle = copied(case)
    expected = peft.get_peft_model_state_dict(oracle)
    assert {name: t.shape for name, t in live(model).items()} == {name: t.shape for name, t in expected.items()}
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
    mine = loss(model) + method.penalty(model)
    right = oracle(input_ids=TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
    mine.backward()
    right.backward()
    grads = {n.replace(".default", "").replace(".modules_to_save", ""): p.grad for n, p in oracle.named_parameters()}
    for name, tensor in live(model).items():
        torch.testing.assert_close(tensor.grad, grads[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert tensor.grad.abs().max() > 0


def test_same_merged_weights(case: Case) -> None:
    method, model, oracle = copied(case)
    method.merge(model)
    merged = oracle.merge_and_unload().state_dict()
    assert list(model.state_dict()) == list(merged)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)


class Matrices(nn.Module):
    """What PEFT's allocator asks of a model: parameters under its names, of several sizes."""

    def __init__(self, sizes: list[tuple[int, int]], rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.places = nn.ModuleList()
        for inputs, outputs in sizes:
            place = nn.Module()
            for name, shape in (("lora_A", (rank, inputs)), ("lora_E", (rank, 1)), ("lora_B", (outputs, rank))):
                drawn = nn.Parameter(torch.randn(shape, generator=generator))
                setattr(place, name, nn.ParameterDict({"default": drawn}))
            self.places.append(place)


SIZES = [(5, 7), (12, 4), (3, 3), (9, 16)]


@pytest.mark.parametrize(
    "schedule",
    [
        {"tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 20},
        {"tinit": 4, "tfinal": 6, "deltaT": 1, "total_step": 25},
        {"tinit": 3, "tfinal": 5, "deltaT": 4, "total_step": 30},
        {"tinit": 1, "tfinal": 1, "deltaT": 100, "total_step": 12},
    ],
    ids=["from step 1", "usual", "every fourth", "only at the end"],
)
@pytest.mark.parametrize("target", [0, 2, 5])
def test_masks_are_those_of_their_allocator(schedule: dict[str, int], target: int) -> None:
    """Same tensors, same gradients, the optimizer's moves between: equal masks and equal lambdas at every step."""
    rank = 6
    config = peft.AdaLoraConfig(init_r=rank, target_r=target, beta1=0.85, beta2=0.7, **schedule)
    oracle = Matrices(SIZES, rank, 0)
    tuner = SimpleNamespace(peft_config={"default": config}, trainable_adapter_name="default", model=oracle)
    tuner.rankallocator = RankAllocator(oracle, config, "default")
    model = nn.Module()
    model.linears = nn.ModuleList(nn.Linear(*size) for size in SIZES)
    method = AdaLoRA(init_r=rank, target_r=target, beta2=0.7, target_modules=r"linears\.\d", **schedule)
    method.attach(model)
    triplets = [site.delta for site in sites(model)]
    pairs = [
        (getattr(place, name)["default"], getattr(one, name))
        for place, one in zip(oracle.places, triplets, strict=True)
        for name in ("lora_A", "lora_E", "lora_B")
    ]
    for right, mine in pairs:
        mine.data.copy_(right.data)
    generator, masks = torch.Generator().manual_seed(1), set()
    for step in range(1, schedule["total_step"] + 3):
        for right, mine in pairs:
            right.grad = torch.randn(right.shape, generator=generator)
            right.data -= 0.3 * right.grad
            mine.data -= 0.3 * right.grad
            mine.grad = right.grad.clone()
        peft.AdaLoraModel.update_and_allocate(tuner, step)
        method.after_step(model, step, 999)
        for right, mine in pairs:
            assert torch.equal(right, mine), step
        if config.rank_pattern:
            expected = [config.rank_pattern[f"places.{i}.lora_E.default"] for i in range(len(SIZES))]
            assert [one.kept_R.tolist() for one in triplets] == expected
            masks.add(str(expected))
    assert sum(int(one.kept_R.sum()) for one in triplets) == target * len(SIZES)
    assert len(masks) >= (1 if schedule["deltaT"] == 100 else 3)


def test_trains_as_peft_trains() -> None:
    """Whole runs side by side: AdamW, penalty, allocation; same losses, same ranks in the end."""
    case = CASES["all linears"]
    oracle = theirs(case)
    method, model = ours(case)
    method.load(model, peft.get_peft_model_state_dict(oracle))
    names = dict(live(model))
    rows = {n.replace(".default", ""): p for n, p in oracle.named_parameters() if p.requires_grad}
    one = torch.optim.AdamW([rows[name] for name in names], lr=1e-2, weight_decay=0.0)
    two = torch.optim.AdamW(names.values(), lr=1e-2, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        right, mine = oracle(input_ids=TOKENS, labels=TOKENS).loss, loss(model) + method.penalty(model)
        torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
        right.backward()
        mine.backward()
        one.step()
        two.step()
        oracle.base_model.update_and_allocate(step)
        method.after_step(model, step, STEPS)
        one.zero_grad()
        two.zero_grad()
    assert method.config(model)["rank_pattern"] == {
        name.replace(".default", ""): mask for name, mask in oracle.peft_config["default"].rank_pattern.items()
    }
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-4, rtol=1e-3)


def pruned(case: Case, **changes: Any) -> tuple[AdaLoRA, nn.Module]:
    """Ours, trained through a whole schedule of eight steps."""
    method, model = ours(case, **{"tinit": 1, "tfinal": 2, "total_step": 8, **changes})
    train(method, model, 8)
    assert any(not all(mask) for mask in method.config(model)["rank_pattern"].values())
    return method, model


@pytest.mark.parametrize("target", [3, 1])
def test_our_file_in_peft(case: Case, target: int, tmp_path: Path) -> None:
    """Pruned, some matrices down to rank 0: the file holds the kept triplets, PEFT computes the same."""
    method, model = pruned(case, target_r=target)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    oracle = peft.PeftModel.from_pretrained(base(case[0]), tmp_path / "a").eval()
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    kept = sum(sum(mask) for mask in method.config(model)["rank_pattern"].values())
    assert sum(len(t) for name, t in tensors.items() if name.endswith("lora_A")) == kept
    assert kept == target * sum(isinstance(site.delta, Triplets) for site in sites(model) if hasattr(site, "delta"))
    again = base(case[0])
    load_adapter(tmp_path / "a", again)
    assert torch.equal(logits(again), logits(model))


def test_their_file_in_ours(case: Case, tmp_path: Path) -> None:
    oracle = theirs(case, tinit=0, tfinal=0, total_step=6)
    stir(oracle)
    optim = torch.optim.AdamW([p for p in oracle.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 6):
        oracle(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optim.step()
        oracle.base_model.update_and_allocate(step)
        optim.zero_grad()
    oracle.save_pretrained(tmp_path / "a")
    model, notes = base(case[0]), []
    method = load_adapter(tmp_path / "a", model, notes=notes)
    assert not notes
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
    save_adapter(tmp_path / "b", method, model, base_path="tiny")
    first, second = (load_file(tmp_path / f"{n}/adapter_model.safetensors") for n in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_file_between_two_allocations_is_the_model(tmp_path: Path) -> None:
    """Pruned lambdas that have moved since the last allocation are in the file too."""
    method, model = ours(CASES["some"], tinit=0, tfinal=2, deltaT=4, total_step=12)
    train(method, model, 4)
    before = int(sum(site.delta.pattern_R().sum() for site in sites(model)))
    train(method, model, 1, first=4)
    assert int(sum(site.delta.pattern_R().sum() for site in sites(model))) > before
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    again = base("qwen2")
    load_adapter(tmp_path / "a", again)
    assert torch.equal(logits(again), logits(model))


def test_nothing_is_pruned_where_target_is_init() -> None:
    method, model = ours(CASES["some"], target_r=6)
    train(method, model, STEPS)
    assert method.config(model)["rank_pattern"] is None


def test_default_shares_of_the_run() -> None:
    method, model = ours(CASES["some"], tinit=None, tfinal=None, total_step=None)
    schedule = method.schedule(model, 200)
    assert (schedule.tinit, schedule.tfinal, schedule.last) == (20, 60, 140)
    assert not schedule.allocates(20) and schedule.allocates(21) and schedule.allocates(140)
    assert not schedule.allocates(141)
    budgets = [schedule.budget(step) for step in range(1, 201)]
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0], budgets[-1]) == (6 * len(sites(model)), 3 * len(sites(model)))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_keep_something(steps: int) -> None:
    method, model = ours(CASES["some"], tinit=None, tfinal=None, total_step=None)
    for step in range(1, steps + 1):
        method.before_step(model, step, steps)
        (loss(model) + method.penalty(model)).backward()
        stir(model)
        method.after_step(model, step, steps)
    assert sum(int(site.delta.kept_R.sum()) for site in sites(model)) >= 3 * len(sites(model))


def test_a_schedule_without_room_is_refused_before_the_first_step() -> None:
    method, model = ours(CASES["some"], tinit=5, tfinal=5, total_step=None)
    with pytest.raises(RecipeError, match="none of the 10 steps") as caught:
        method.before_step(model, 1, 10)
    assert caught.value.where == "method.tinit"
    method.before_step(model, 1, 11)


def test_ties_at_the_threshold_all_go_and_no_importance_keeps_all() -> None:
    scores = [torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 3.0])]
    assert [mask.tolist() for mask in allocate(scores, 3)] == [[False] * 3, [False, True]]
    assert all(mask.all() for mask in allocate([torch.zeros(3)], 1))
    assert all(mask.all() for mask in allocate(scores, 5))


def test_the_budget_falls_by_a_cube() -> None:
    schedule = Schedule(start=100, target=20, steps=10, tinit=2, tfinal=2, every=1)
    assert [schedule.budget(step) for step in range(1, 11)] == [100, 100, 66, 43, 30, 22, 20, 20, 20, 20]


def test_only_importance_of_real_gradients_counts() -> None:
    """A tensor without a gradient (an expert without a token) had no part in the step."""
    triplets = Triplets(nn.Linear(4, 3), 2, 4.0, 0.0)
    triplets.gather(0.85, 0.85)
    assert not triplets.scores_R().any()


@pytest.mark.parametrize(
    "fields",
    [
        {"target_r": 13}, {"init_r": 0}, {"deltaT": 0}, {"beta1": 1.0}, {"orth_reg_weight": -0.1},
        {"lora_dropout": 1.0}, {"rank_pattern": {"a.lora_E": [True]}}, {"layers_pattern": "layers"}, {"lora_alpha": 0},
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        AdaLoRA(**fields)
    assert caught.value.where == f"method.{next(iter(fields))}"
    assert caught.value.remedy


def test_what_does_not_fit_the_model_is_refused() -> None:
    for fields in (
        {"rank_pattern": {"model.nowhere.lora_E": [True] * 12}},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["nowhere"]},
    ):
        model = base("llama")
        with pytest.raises(RecipeError):
            AdaLoRA(**fields).attach(model)
        assert not sites(model)
    with pytest.raises(RecipeError, match="shares its weight"):
        AdaLoRA(modules_to_save=("lm_head",)).attach(base("llama", tied=True))


def test_a_file_with_another_mathematics_is_refused(tmp_path: Path) -> None:
    oracle = theirs(CASES["some"], bias="all")
    oracle.save_pretrained(tmp_path / "a")
    with pytest.raises(LuthierError, match="bias"):
        load_adapter(tmp_path / "a", base("qwen2"))


def test_a_base_that_cannot_take_the_change_is_left_alone() -> None:
    method, model = ours(CASES["some"])
    site = sites(model)[-1]
    site.base_layer.weight = nn.Parameter(site.base_layer.weight.to(torch.int8), requires_grad=False)
    before: Tensor = sites(model)[0].base_layer.weight.clone()
    with pytest.raises(NotMergeable):
        method.merge(model)
    assert torch.equal(sites(model)[0].base_layer.weight, before)


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_config_has_only_keys_that_peft_knows(tmp_path: Path) -> None:
    method, model = AdaLoRA(), base("llama")
    method.attach(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    read = peft.AdaLoraConfig.from_pretrained(str(tmp_path / "a"))
    assert (read.init_r, read.target_r, read.lora_alpha, read.rank_pattern) == (12, 8, 24, None)
