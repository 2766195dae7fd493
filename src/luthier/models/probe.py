"""Opening a trunk: is a packed forest through this model the same as every path alone? Asked once, in numbers.

Neither class flags nor call counts tell which families may be packed: many give wrong numbers without an error
(state space, convolutions, decoders that ignore positions). So a small forest (several roots, a star, a tree,
longer than the window) goes through the model and is compared with each root-to-leaf path run alone by the
model's own attention, logits and gradients of all weights; attention must have run in every layer. Large models
are represented by a few-layer cut (models/cut.py).

    logits     max|d| / max(1, max|ref|)                 <= 1e-5, or 4x the model's own rounding noise
    gradients  max|d| / (max|g| + 1e-3 max over all)     <= 2e-4, for every weight

What misses these by little is asked again in double precision, where rounding vanishes (1e-9) and a fault stays.

A family that fails takes the unpacked path, itself checked the same way, or is refused with the reason. The
model is left exactly as found: modes, gradients, attention, random state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from luthier.contracts.batch import Batch, Forest
from luthier.contracts.errors import ModelError
from luthier.models.attention import ForestMask, forest_attention, witnessed
from luthier.models.cut import subjects
from luthier.models.head import find_head_map, relative_difference
from luthier.models.kernels.varlen import varlen_refusal
from luthier.models.limits import Limits, OwnPositions, counts_after_padding, limits_of, padding_of
from luthier.models.logprobs import HeadMap, gather_logprobs
from luthier.models.prompt_edges import nothing_edited
from luthier.models.shapes import decoder_layers
from luthier.models.switch import native_attention
from luthier.models.trunk import Trunk, TrunkFacts
from luthier.models.unpacked import leaves

LOGITS, GRADIENTS, NOISE, CAUSAL, EXACT = 1e-5, 2e-4, 1e-4, 1e-3, 1e-9
_PARENTS = (-1, 0, 1, 1, 0, -1, 5, 5, -1)  # a tree, a star, a lone root
_LENGTHS = (11, 9, 13, 8, 7, 12, 9, 10, 17)


def open_trunk(model: nn.Module, *, attention: str = "auto") -> Trunk:
    """A trunk whose path was shown to be exact on this model. `attention`: auto, forest or unpacked."""
    if attention not in ("auto", "forest", "unpacked"):
        raise ModelError("unknown path", where="model.attention", value=attention, remedy="auto, forest or unpacked")
    with torch.random.fork_rng(_cuda_devices(model)), nothing_edited():  # its rows have no prompts
        torch.manual_seed(0)
        subject, noise = _first_that_runs(model)
        with _undisturbed(subject):
            facts = _decide(model, subject, noise, attention)
    return Trunk(model, facts)


def probe_batch(vocabulary: int, parents: tuple[int, ...] = _PARENTS, lengths: tuple[int, ...] = _LENGTHS) -> Batch:
    """A forest of random tokens in which every token that has a predecessor is scored."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    forest = Forest((0, *ends[:-1]), tuple(ends), parents)
    tokens_T = torch.randint(3, vocabulary, (forest.tokens,), generator=torch.Generator().manual_seed(7))
    scored: list[int] = []
    targets: list[int] = []
    for segment, parent in enumerate(parents):
        start, end = forest.start[segment], forest.end[segment]
        rows = [forest.end[parent] - 1] if parent >= 0 else []
        rows += range(start, end - 1)
        scored += rows
        targets += tokens_T[end - len(rows) : end].tolist()
    count = len(scored)
    return Batch(
        tokens_T=tokens_T,
        positions_T=forest.positions_T(),
        forest=forest,
        scored_N=torch.tensor(scored),
        targets_N=torch.tensor(targets),
        weights_N=torch.linspace(0.5, 1.5, count),
        sequence_N=torch.zeros(count, dtype=torch.int64),
        group_Q=torch.zeros(1, dtype=torch.int64),
        samples=(0,),
        sources=(),
        segment_sample=(0,) * len(forest),
    )


def _decide(model: nn.Module, subject: nn.Module, noise: float, attention: str) -> TrunkFacts:
    batch = _batch_for(subject)
    head_map = find_head_map(subject, batch.tokens_T[:24])
    evidence: dict[str, float] = {"noise": noise}
    reason = "asked for"
    if attention != "unpacked":
        limits, reason = _packs(model, subject, head_map, batch, evidence)
        if not reason:
            parameter = next(model.parameters())
            kernel, _ = choose_kernel(parameter.device, parameter.dtype)
            whole = _last_layer_refusal(subject, kernel, head_map, batch, evidence)
            last = "whole" if whole else "scored rows"
            return TrunkFacts("forest", "", kernel, head_map, last, whole or "", evidence, limits)
        if attention == "forest":
            raise ModelError(
                f"this model cannot run packed forests: {reason}",
                where="model.attention",
                value=_family(model),
                remedy="model.attention: auto takes the unpacked path",
            )
    wrong = _differs(subject, TrunkFacts("unpacked", head_map=head_map), batch, evidence)
    if wrong:
        raise ModelError(f"rows run together differ from rows alone: {wrong}", value=_family(model))
    return TrunkFacts("unpacked", reason, "sdpa", head_map, "whole", "unpacked rows", evidence)


def _packs(
    model: nn.Module, subject: nn.Module, head_map: HeadMap | None, batch: Batch, evidence: dict[str, float]
) -> tuple[Limits, str]:
    """Up to where the model may be packed, and why it may not (empty where it may)."""
    try:
        counted = counts_after_padding(subject, batch.tokens_T[:24])
    except OwnPositions as refusal:
        return Limits(), str(refusal)
    short = Limits(padding=padding_of(subject) if counted else None)
    facts = TrunkFacts("forest", head_map=head_map, limits=short)
    limits = replace(limits_of(model.config), padding=padding_of(model) if counted else None)
    wrong = _differs(subject, facts, batch, evidence)
    if (
        wrong and evidence.get("forest_logits", 1.0) <= NOISE
    ):  # rounding or a fault? In double precision only a fault stays
        exact: dict[str, float] = {"noise": 0.0}
        if _differs(copy.deepcopy(subject).double(), facts, batch, exact) is None and exact["forest_logits"] <= EXACT:
            wrong = None
        evidence |= {f"double_{name}": value for name, value in exact.items()}
    return limits, wrong or ""


def _differs(subject: nn.Module, facts: TrunkFacts, batch: Batch, evidence: dict[str, float]) -> str | None:
    """Why a path is not exact on the subject, or None; the measured differences go into `evidence`."""
    trunk, path = Trunk(subject, facts), facts.path
    try:
        with torch.no_grad(), witnessed() as seen:
            logits_NV = trunk.logits(batch)
        _, layers = decoder_layers(subject)
        if path == "forest" and len(set(seen)) < max(1, len(layers)):
            return f"attention ran in {len(set(seen))} of {len(layers)} layers"
        gradients = _gradients(subject, (trunk.logprobs(batch) * batch.weights_N.to(logits_NV.device)).sum())
    except Exception as error:  # noqa: BLE001 any failure of a foreign family is a reason, never a crash of the run
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    finally:
        trunk.close()
    expected_NV, expected = _alone(subject, batch)
    off = relative_difference(logits_NV, expected_NV)
    limit = min(NOISE, max(LOGITS, 4 * evidence["noise"]))
    evidence[f"{path}_logits"] = off
    if not off <= limit:
        return f"logits differ by {off:.1e} (limit {limit:.0e})"
    off = _gradients_apart(gradients, expected)
    evidence[f"{path}_gradients"] = off
    if not off <= GRADIENTS:
        return f"gradients differ by {off:.1e} (limit {GRADIENTS:.0e})"
    return None


def _last_layer_refusal(
    subject: nn.Module, kernel: str, head_map: HeadMap | None, batch: Batch, evidence: dict[str, float]
) -> str | None:
    """Why the last layer must compute every row, or None: compared with the whole layer on a few scored tokens."""
    if head_map is None:
        return "the head is not known apart from the decoder"
    if kernel != "sdpa":
        return f"the {kernel} kernel takes whole segments"
    some = torch.arange(batch.scored, device=batch.scored_N.device)
    some = some[(some % 7 < 2) | (some % 29 > 18)]  # single rows, neighbours and runs
    fewer = replace(
        batch, scored_N=batch.scored_N[some], targets_N=batch.targets_N[some], weights_N=batch.weights_N[some],
        sequence_N=batch.sequence_N[some],
    )  # fmt: skip
    found = []
    for last in ("scored rows", "whole"):
        trunk = None
        try:
            trunk = Trunk(subject, TrunkFacts(head_map=head_map, last_layer=last))
            logprobs_N = trunk.logprobs(fewer)
            found.append((logprobs_N.detach(), _gradients(subject, (logprobs_N * fewer.weights_N).sum())))
        except Exception as error:  # noqa: BLE001 a layer of another build: it computes every row
            lines = str(error).splitlines() or [""]
            return f"{type(error).__name__}: {lines[0][:200]}"
        finally:
            if trunk is not None:
                trunk.close()
    (logprobs_N, gradients), (expected_N, expected) = found
    evidence["last_layer_logprobs"] = off = relative_difference(logprobs_N, expected_N)
    if not off <= LOGITS:
        return f"log-probabilities differ by {off:.1e} (limit {LOGITS:.0e})"
    evidence["last_layer_gradients"] = off = _gradients_apart(gradients, expected)
    return None if off <= GRADIENTS else f"gradients differ by {off:.1e} (limit {GRADIENTS:.0e})"


def _alone(subject: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor | None]]:
    """Logits (N, V) and gradients with every root-to-leaf path run as one native row."""
    device = next(subject.parameters()).device
    forest = batch.forest
    found: dict[int, Tensor] = {}
    with native_attention(subject):
        for leaf in leaves(forest):
            rows = [row for s in forest.chain(leaf) for row in range(forest.start[s], forest.end[s])]
            logits = subject(input_ids=batch.tokens_T[rows][None].to(device), use_cache=False).logits[0]
            found |= {row: logits[place] for place, row in enumerate(rows) if row not in found}
        logits_NV = torch.stack([found[row] for row in batch.scored_N.tolist()])
        logprobs_N = gather_logprobs(logits_NV, batch.targets_N.to(device))
        gradients = _gradients(subject, (logprobs_N * batch.weights_N.to(device)).sum())
    return logits_NV.detach(), gradients


def _gradients(subject: nn.Module, total: Tensor) -> list[Tensor | None]:
    """Of every weight that is a number; packed codes have none."""
    numbers = [parameter for parameter in subject.parameters() if parameter.is_floating_point()]
    return list(torch.autograd.grad(total, numbers, allow_unused=True))


def _gradients_apart(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    largest = max((g.abs().max().item() for g in expected if g is not None), default=0.0)
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        if mine is None and theirs is None:
            continue
        some = mine if mine is not None else theirs
        assert some is not None
        theirs = torch.zeros_like(some) if theirs is None else theirs
        mine = torch.zeros_like(some) if mine is None else mine
        off = (mine - theirs).abs().max().item() / (theirs.abs().max().item() + 1e-3 * largest + 1e-30)
        worst = max(worst, off) if off == off else float("inf")
    return worst


def _batch_for(subject: nn.Module) -> Batch:
    tables = (subject.get_input_embeddings(), subject.get_output_embeddings())
    sizes = [table.weight.shape[0] for table in tables if hasattr(table, "weight")]
    if not sizes:
        raise ModelError("the model has no one table of token embeddings", value=_family(subject))
    vocabulary = min(sizes)
    device = next(subject.parameters()).device
    text = subject.config.get_text_config()
    window = max(getattr(text, "sliding_window", None) or 0, getattr(text, "attention_chunk_size", None) or 0)
    stretch = 4 if window > 16 else 1  # a path must be longer than the window
    return probe_batch(vocabulary, lengths=tuple(stretch * n for n in _LENGTHS)).to(device)


def _first_that_runs(model: nn.Module) -> tuple[nn.Module, float]:
    """The first subject whose own forward works, and its rounding noise; ModelError if none does."""
    problem = "no forward pass"
    for subject in subjects(model):
        with _undisturbed(subject):
            try:
                noise = _noise(subject, _batch_for(subject).tokens_T[:40])
            except Exception as error:  # noqa: BLE001 a cut that this family does not accept, or a model that cannot run
                lines = str(error).splitlines() or [""]
                problem = f"{type(error).__name__}: {lines[0][:200]}"
                continue
        if noise > CAUSAL:
            raise ModelError(
                f"later tokens change earlier predictions (by {noise:.1e}): not a causal language model",
                value=_family(model),
            )
        return subject, noise
    raise ModelError(f"the model does not run: {problem}", value=_family(model))


@torch.no_grad()
def _noise(subject: nn.Module, tokens_T: Tensor) -> float:
    """Difference of a row's logits when other tokens follow: rounding in a causal model, much more otherwise."""
    worst = 0.0
    with native_attention(subject):
        whole = subject(input_ids=tokens_T[None], use_cache=False).logits[0]
        for part in (8, 4, 2):
            some = subject(input_ids=tokens_T[None, : len(tokens_T) // part], use_cache=False).logits[0]
            worst = max(worst, relative_difference(whole[: len(some)], some))
    return worst


def choose_kernel(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(`varlen`, "") where the device has the kernel and it agrees with the per-segment path, else (`sdpa`, why)."""
    refusal = varlen_refusal(device, dtype)
    if refusal is not None:
        return "sdpa", refusal
    forest = probe_batch(32).forest
    made = torch.Generator(device=device).manual_seed(3)
    q, k, v = (torch.randn(1, heads, forest.tokens, 64, generator=made, device=device) for heads in (4, 2, 2))
    layer = nn.Identity()
    for window in (None, 8):
        try:
            mask = ForestMask(forest, window, kernel="varlen")
            fast, _ = forest_attention(layer, q.to(dtype), k.to(dtype), v.to(dtype), mask)
        except Exception as error:  # noqa: BLE001 a build without it: the per-segment path runs everywhere
            return "sdpa", f"the variable-length kernel raises {type(error).__name__}: {error}"
        plain, _ = forest_attention(layer, q, k, v, ForestMask(forest, window))
        if not relative_difference(fast.float(), plain) <= 2e-2:
            return "sdpa", "the variable-length kernel disagrees with the per-segment path"
    return "varlen", ""


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and every weight differentiable within it; modes and flags as found after."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        for parameter, _ in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def _family(model: nn.Module) -> str:
    return str(getattr(model.config, "model_type", type(model).__name__))
