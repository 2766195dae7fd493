"""The gate on real batches: each check passes on good rows and fails, with evidence, on bad ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from engine import rig
from engine.pairs import Preference, Shifted
from luthier.contracts.batch import Batch, Forest
from luthier.contracts.objective import Loss, Objective, Scored
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.stream import Stream
from luthier.engine.gate import GateFailure, run_gate
from luthier.engine.gate_numbers import beside, unshared
from luthier.engine.gate_spec import GateSpec, Prompt
from luthier.engine.scoring import Scorer
from luthier.engine.task import Run


def spec_of(run: Run, **changes: Any) -> GateSpec:
    trunk, objective = changes.pop("trunk", run.trunk), changes.pop("objective", run.objective)
    given: dict[str, Any] = dict(
        scorer=Scorer(trunk, objective, run.device, run.precision), stream=run.stream,
        stop_ids=(260,), bos_id=257, roles={"assistant": 10}, rows_read=48,
    )  # fmt: skip
    return GateSpec(**{**given, **changes})


def stream_of(samples: Sequence[Sample], run: Run) -> Stream:
    return Stream(samples, run.stream.spec)


def failed(spec: GateSpec) -> dict[str, Any]:
    """The evidence of the one check that fails."""
    with pytest.raises(GateFailure) as caught:
        run_gate(spec)
    assert caught.value.exit_code == 3
    json.dumps(caught.value.evidence, allow_nan=False)
    bad = [check for check in caught.value.evidence["checks"] if check["status"] == "fail"]
    assert len(bad) == 1, bad
    assert bad[0]["remedy"]
    assert bad[0]["name"] in caught.value.line()
    return bad[0]


def with_piece(sample: Sample, tokens: Sequence[int], weights: Sequence[float]) -> Sample:
    return replace(sample, pieces=(Piece(tokens, weights),))


@pytest.mark.parametrize(("method", "precision"), [("lora", "fp32"), ("full", "fp32"), ("lora", "bf16")])
def test_good_rows_pass_and_nothing_is_left_behind(tmp_path: Path, method: str, precision: str) -> None:
    run = rig.build(tmp_path, method=method, precision=precision)
    model = run.trunk.model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prompts = [Prompt(str(s.source), s.pieces[0].tokens[:4], s.pieces[0].tokens) for s in run.stream.samples[:8]]
    evidence = run_gate(spec_of(run, prompts=prompts))
    assert torch.equal(torch.rand(3), expected)
    assert evidence["passed"]
    assert {check["status"] for check in evidence["checks"]} == {"pass"}
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    json.dumps(evidence, allow_nan=False)


def test_a_row_without_supervision(tmp_path: Path) -> None:
    run = rig.build(tmp_path)
    samples = rig.samples()
    tokens = samples[7].pieces[0].tokens
    samples[7] = with_piece(samples[7], tokens, [0.0] * len(tokens))
    bad = failed(spec_of(run, stream=stream_of(samples, run)))
    assert bad["name"] == "supervised tokens"
    assert bad["evidence"]["examples"] == ["rig.jsonl:8"]


def test_a_role_that_trains_nothing(tmp_path: Path) -> None:
    bad = failed(spec_of(rig.build(tmp_path), roles={"assistant": 10, "tool": 0}))
    assert bad["evidence"]["by_role"]["tool"] == 0


def test_no_stop_token(tmp_path: Path) -> None:
    run = rig.build(tmp_path)
    cut = [with_piece(s, s.pieces[0].tokens[:-1], s.pieces[0].weights[:-1]) for s in rig.samples()]
    assert failed(spec_of(run, stream=stream_of(cut, run)))["name"] == "stop token"


def test_some_rows_without_a_stop_token_warn(tmp_path: Path) -> None:
    run = rig.build(tmp_path)
    samples = rig.samples()
    samples[3] = with_piece(samples[3], samples[3].pieces[0].tokens[:-1], samples[3].pieces[0].weights[:-1])
    checks = {c["name"]: c for c in run_gate(spec_of(run, stream=stream_of(samples, run)))["checks"]}
    assert checks["stop token"]["status"] == "warn"
    assert checks["stop token"]["evidence"]["examples"] == ["rig.jsonl:4"]


def test_bos_twice(tmp_path: Path) -> None:
    run = rig.build(tmp_path)
    samples = rig.samples()
    piece = samples[0].pieces[0]
    samples[0] = with_piece(samples[0], [257, *piece.tokens], [0.0, *piece.weights])
    bad = failed(spec_of(run, stream=stream_of(samples, run)))
    assert (bad["name"], bad["evidence"]["most"]) == ("one bos", 2)
    assert run_gate(spec_of(run, stream=stream_of(samples, run), bos_id=None))["passed"]


def test_another_prompt_at_inference(tmp_path: Path) -> None:
    run = rig.build(tmp_path)
    tokens = run.stream.samples[0].pieces[0].tokens
    prompts = [Prompt("a.jsonl:1", tokens[:3], tokens), Prompt("a.jsonl:2", [tokens[0], 1, 2], tokens)]
    bad = failed(spec_of(run, prompts=prompts))
    assert bad["evidence"]["examples"] == ["a.jsonl:2 (differs at token 1)"]


@pytest.mark.parametrize(("lost", "status"), [(1, "pass"), (10, "warn"), (30, "fail")])
def test_rows_lost(tmp_path: Path, lost: int, status: str) -> None:
    spec = spec_of(rig.build(tmp_path), dropped={"longer than max_tokens": lost})
    if status == "fail":
        assert failed(spec)["name"] == "rows lost"
    else:
        assert {c["name"]: c["status"] for c in run_gate(spec)["checks"]}["rows lost"] == status


class Leaky:
    """A trunk in which rows of one pack see each other: what a family without packing support does."""

    def __init__(self, run: Run) -> None:
        self.inner, self.model = run.trunk, run.trunk.model

    def logprobs(self, batch: Batch, coefficients_N: Tensor | None = None) -> Tensor:
        ids = batch.tokens_T[None]
        logits = self.model.base_model(input_ids=ids, position_ids=torch.arange(batch.tokens)[None])[0]
        logits = self.model.lm_head(logits)[0]
        return logits[batch.scored_N].log_softmax(-1).gather(1, batch.targets_N[:, None])[:, 0]


def test_packed_rows_that_see_each_other(tmp_path: Path) -> None:
    run = rig.build(tmp_path)
    run.trunk.close()
    failures = []
    with pytest.raises(GateFailure) as caught:
        run_gate(spec_of(run, trunk=Leaky(run)))
    failures = [check["name"] for check in caught.value.evidence["checks"] if check["status"] == "fail"]
    assert "packed = alone" in failures


def pair_spec(tmp_path: Path, **changes: Any) -> GateSpec:
    run = rig.build(tmp_path, reference="method_off")
    trunk = changes.pop("trunk", run.trunk)
    scorer = Scorer(trunk, changes.pop("objective", run.objective), run.device, run.precision, run.reference)
    return GateSpec(scorer=scorer, stream=run.stream, stop_ids=(260,), bos_id=257, rows_read=48, **changes)


@pytest.mark.parametrize("objective", [Preference(), Shifted()])
def test_trees_pass_each_answer_compared_with_a_whole_row_of_its_own(tmp_path: Path, objective: Objective) -> None:
    evidence = run_gate(pair_spec(tmp_path, objective=objective))
    checks = {check["name"]: check for check in evidence["checks"]}
    assert {checks[name]["status"] for name in ("packed = alone", "accumulation", "stop token")} == {"pass"}
    assert checks["finite loss"]["evidence"]["loss"] > 0.5


def test_answers_that_see_each_other(tmp_path: Path) -> None:
    """The same rows in the same pack, but the tree taken for one row: alone it would look alike."""
    run = rig.build(tmp_path, reference="method_off")

    class Flat:
        model = run.trunk.model

        def logprobs(self, batch: Batch, coefficients_N: Tensor | None = None) -> Tensor:
            forest, groups = batch.forest, batch.segment_sample
            starts = [s for i, s in enumerate(forest.start) if i == 0 or groups[i] != groups[i - 1]]
            whole = Forest(tuple(starts), (*starts[1:], batch.tokens), (-1,) * len(starts))
            return run.trunk.logprobs(replace(batch, forest=whole, positions_T=whole.positions_T()))

    with pytest.raises(GateFailure) as caught:
        run_gate(pair_spec(tmp_path / "b", trunk=Flat()))
    failures = [check["name"] for check in caught.value.evidence["checks"] if check["status"] == "fail"]
    assert failures == ["packed = alone"]


def test_the_sequences_of_a_tree_as_rows() -> None:
    """With the prompt as the last sequence too, as ORPO's objective asks for it."""
    prompt, good, bad = Piece([1, 2, 3], [0.0, 1.0, 1.0]), Piece([4, 5], [1.0, 1.0], 0), Piece([6], [1.0], 0)
    rows = unshared(Sample((prompt, good, bad), Source("a.jsonl", 1), 0, (1, 2, 0)))
    assert [list(row.pieces[0].tokens) for row in rows] == [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 6]]
    assert [list(row.pieces[0].weights) for row in rows] == [[0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 1]]


@dataclass(frozen=True)
class Lead(Objective):
    """Bradley and Terry's loss on scores."""

    reads: ClassVar[str] = "scores"

    def weight(self, batch: Batch) -> float:
        return float(len(batch.samples))

    def loss(self, out: Scored, batch: Batch, stats: Any) -> Loss:
        assert out.scores_Q is not None
        return Loss(-torch.nn.functional.logsigmoid(out.scores_Q[0::2] - out.scores_Q[1::2]).sum())


class Scores:
    """A reward model whose score is a number of the last hidden row, with the share that a pack's size has in it."""

    def __init__(self, run: Run, leak: float = 0.0) -> None:
        self.inner, self.model, self.leak = run.trunk, run.trunk.model, leak

    def scores(self, batch: Batch) -> Tensor:
        assert batch.last_Q is not None
        last = replace(batch, scored_N=batch.last_Q, targets_N=torch.full_like(batch.last_Q, 40))
        sign_Q = 1 - 2 * (batch.tokens_T[batch.last_Q - 1] % 2)
        return sign_Q * (self.inner.logprobs(last) + 5.0) + self.leak * batch.tokens


@pytest.mark.parametrize("leak", [0.0, 1e-3])
def test_scores_of_packed_rows_are_compared_one_by_one(tmp_path: Path, leak: float) -> None:
    run = rig.build(tmp_path, reference="method_off")
    spec = spec_of(run, trunk=Scores(run, leak), objective=Lead())
    if leak:
        assert failed(spec)["name"] == "packed = alone"
    else:
        assert run_gate(spec)["passed"]


def test_scores_that_cancel_are_not_compared_by_their_sum() -> None:
    alone = torch.tensor([4.0, -4.0, 2.0, -2.0], dtype=torch.float64)
    rounded = alone + torch.tensor([1e-7, 0.0, 0.0, 0.0], dtype=torch.float64)
    ((one, two),) = beside(rounded, alone, "scores").values()
    assert abs(one - two) / two == pytest.approx(2.5e-8, rel=1e-3)


class MeanOfMeans(Objective):
    """The classic fault: each microbatch's mean, whatever its size."""

    def weight(self, batch: Batch) -> float:
        return 1.0

    def loss(self, out: Scored, batch: Batch, stats: Any) -> Loss:
        return Loss(-out.logprobs_N.mean())


def test_an_objective_that_depends_on_the_split(tmp_path: Path) -> None:
    bad = failed(spec_of(rig.build(tmp_path), objective=MeanOfMeans()))
    assert bad["name"] == "accumulation"


def test_a_base_that_gives_nan(tmp_path: Path) -> None:
    run = rig.build(tmp_path)
    next(run.trunk.model.parameters()).data.fill_(float("nan"))
    assert failed(spec_of(run))["name"] == "finite loss"


def test_the_numeric_checks_stay_within_their_budget(tmp_path: Path) -> None:
    run = rig.build(tmp_path, tokens_per_step=10_000)
    seen = []

    class Counting(Leaky):
        def logprobs(self, batch: Batch, coefficients_N: Tensor | None = None) -> Tensor:
            seen.append(batch.tokens)
            return self.inner.logprobs(batch)

    run_gate(spec_of(run, trunk=Counting(run)))
    assert max(seen) <= 2048
    assert sum(seen) <= 4 * 2048
