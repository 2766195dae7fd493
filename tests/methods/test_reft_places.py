"""Where ReFT edits: the same rows packed, kept by the last layer, recomputed, in trees, scored, generated, natively.

Every way of running a prompt must edit it alike, or training and use are two different models.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForSequenceClassification

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.batch import Batch
from luthier.contracts.errors import ModelError
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.collate import collate
from luthier.engine.gate_numbers import unshared
from luthier.engine.memory import checkpoint_activations
from luthier.methods.loreft import LoReFT
from luthier.models.probe import open_trunk
from luthier.models.score_head import every_output
from luthier.models.sites import AdaptedModule, original_name
from luthier.models.trunk import Trunk, TrunkFacts
from luthier.sampling.generate import SamplingSpec, generate
from methods.reft_rig import ALL, LONG, attached, batch_of, gradients, named, same_numbers, samples_of
from methods.rig import base
from tiny import tiny
from tiny_families import family


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ALL, ids=named)
def test_every_variant_packed_is_each_row_alone(method: LoReFT, family: str) -> None:
    model = attached(method, family)
    whole, alone = batch_of(*LONG), [collate([sample]) for sample in samples_of(*LONG)]
    found = {}
    for attention in ("forest", "unpacked"):
        trunk = open_trunk(model, attention=attention)
        with torch.no_grad():
            found[attention] = trunk.logprobs(whole)
            apart = torch.cat([trunk.logprobs(one) for one in alone])
        same_numbers(found[attention], apart)
        trunk.close()
    same_numbers(found["forest"], found["unpacked"])


def test_edits_are_where_they_should_be() -> None:
    """Layer 0 only: its output differs from the base's at 7 + 7 rows of the prompt and nowhere else."""
    model = attached(LoReFT(layers=(0,)))
    seen: list[Tensor] = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        trunk, batch = Trunk(model), batch_of((20, 4), (2, 3))
        trunk.logprobs(batch)
        with LoReFT().off(model):
            trunk.logprobs(batch)
    handle.remove()
    changed = (seen[0] != seen[1]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [*range(7), *range(13, 20), 24, 25]


def test_rows_that_are_kept_in_the_last_layer_get_the_same_edits() -> None:
    for opened_first in (False, True):
        torch.manual_seed(0)
        model, method, facts = base("llama"), LoReFT(), TrunkFacts(last_layer="scored rows")
        trunk = Trunk(model, facts) if opened_first else None
        method.attach(model)
        trunk = trunk or Trunk(model, facts)
        batch, made = batch_of(*LONG), []
        for kept in (True, False):
            if not kept:
                trunk.close()
                trunk = Trunk(model)
            assert (trunk._kept(batch) is not None) == kept
            logprobs = trunk.logprobs(batch)
            made.append((logprobs, *gradients(model, logprobs.sum())))
        same_numbers(made[0], made[1])
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        last = dict(zip(names, made[0][1:], strict=True))
        assert max(float(g.abs().max()) for name, g in last.items() if "layers.1." in name and "suffix" in name) > 0


@pytest.mark.parametrize("attention", ["forest", "unpacked"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_activations_give_the_same_gradients(family: str, attention: str) -> None:
    method = LoReFT(dropout=0.0)
    model, batch, made = attached(method, family), batch_of(*LONG), []
    model.train()
    for recompute in (False, True):
        trunk = open_trunk(model, attention=attention)
        if recompute:
            assert checkpoint_activations(model)
            assert any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())
        logprobs = trunk.logprobs(batch)
        made.append((logprobs, *gradients(model, logprobs.sum())))
        trunk.close()
    same_numbers(made[0], made[1])


def test_a_site_that_is_made_to_run_again_in_backward_says_so() -> None:
    """A checkpoint around the site instead of inside it: the facts of the pass are gone, and nothing is guessed."""
    model = attached(LoReFT())
    site = model.model.layers[0]
    assert isinstance(site, AdaptedModule)
    plain = site.forward
    site.forward = lambda *args, **kwargs: checkpoint(plain, *args, use_reentrant=False, **kwargs)
    total = Trunk(model).logprobs(batch_of(*LONG)).sum()
    with pytest.raises(ModelError, match="checkpoint_activations"):
        total.backward()


def tree_of(root: list[int], *answers: tuple[list[int], list[float]]) -> tuple[Batch, list[Batch]]:
    """One prompt with its answers as a tree, and each path as a row alone."""
    source, count = Source("t.jsonl", 4), len(answers)
    leaves = [Piece(tokens, weights, parent=0) for tokens, weights in answers]
    pieces = (Piece(root, [0.0] * len(root)), *leaves)
    whole = [Piece([*root, *tokens], [0.0] * len(root) + weights) for tokens, weights in answers]
    tree = collate([Sample(pieces, source, id=0, sequences=tuple(range(1, count + 1)))])
    return tree, [collate([Sample((piece,), source, id=0)]) for piece in whole]


DISAGREE = {
    "an answer begins with an untrained token": ([0.0] * 9, [1.0] * 3, [0.0, 1.0, 1.0]),
    "the prompt is scored": ([0.0] + [1.0] * 8, [1.0] * 3, [1.0] * 3),
}


@pytest.mark.parametrize("attention", ["forest", "unpacked"])
@pytest.mark.parametrize("weights", DISAGREE.values(), ids=list(DISAGREE))
def test_sequences_that_disagree_about_a_prompt_run_alone(weights: tuple[list[float], ...], attention: str) -> None:
    root, one, other = weights
    model = attached(LoReFT())
    scored = [0] if any(root) else []
    tokens = [5, 9, 8, 5, 6, 7, 8, 9, 4]
    pieces = (Piece(tokens, root), Piece([6, 7, 8], one, parent=0), Piece([7, 7, 3], other, parent=0))
    sample = Sample(pieces, Source("t.jsonl", 4), id=0, sequences=(1, 2, *scored))
    trunk = open_trunk(model, attention=attention)
    found = trunk.logprobs(collate([sample]))
    apart = torch.cat([trunk.logprobs(collate([one])) for one in unshared(sample)])
    same_numbers(found, apart)
    slopes = torch.linspace(0.5, 1.5, len(found))
    same_numbers(gradients(model, found.dot(slopes)), gradients(model, apart.dot(slopes)))


def reward_model(seed: int) -> nn.Module:
    """A tiny Llama under a random score head."""
    config = copy.deepcopy(tiny("llama").config)
    config.num_labels = 1
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config).eval()


def test_a_score_is_read_after_a_prompt_of_the_whole_row(tmp_path) -> None:
    """In a tree whose answers are shorter than the last seven tokens, alone, and natively; the head is saved too."""
    model, method = reward_model(3), LoReFT()
    method.attach(model)
    trained = {original_name(name) for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("score.") for name in trained)
    with torch.no_grad():
        for parameter in model.score.copy.parameters():
            parameter.mul_(2)
    root, answers = [5, 6, 7, 8, 9, 10], ([11, 12, 13], [14, 15, 16, 17])
    tree, alone = tree_of(root, *((answer, [1.0] * len(answer)) for answer in answers))
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    again = reward_model(3)
    load_adapter(tmp_path / "a", again)
    with torch.no_grad():
        rows = [torch.tensor([root + answer]) for answer in answers]
        native = torch.cat([every_output(model, row)[:, -1, 0] for row in rows])
        trunk = Trunk(model)
        same_numbers(trunk.scores(tree), native)
        same_numbers(torch.cat([trunk.scores(one) for one in alone]), native)
        trunk.close()
        assert torch.equal(torch.cat([every_output(again, row)[:, -1, 0] for row in rows]), native)
        with method.off(model):
            assert torch.equal(every_output(model, rows[0]), every_output(reward_model(3), rows[0]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_continues_as_training_saw_it(family: str) -> None:
    """Prompts of several lengths, padded on the left: each greedy token is the likeliest one of the packed pass."""
    model = attached(LoReFT(), family, steps=6)
    prompts = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 17, 9)]
    made = generate(model, None, prompts, SamplingSpec(max_new_tokens=6))
    for prompt, answer in zip(prompts, made, strict=True):
        assert len(answer) == 6
        piece = Piece([*prompt, *answer], [0.0] * len(prompt) + [1.0] * 6)
        with torch.no_grad():
            trunk = Trunk(model)
            found = trunk.logits(collate([Sample((piece,), Source("g.jsonl", 1), id=0)]))
            trunk.close()
        assert found.argmax(-1).tolist() == answer
    with LoReFT().off(model):
        assert generate(model, None, prompts, SamplingSpec(max_new_tokens=6)) != made


@pytest.mark.parametrize("name", ["llama4", "gemma3", "gpt_oss", "mamba", "qwen3_next", "falcon_h1"])
def test_other_families_keep_their_path_and_edit_alike(name: str) -> None:
    """Windows, sinks, chunks, state-space layers: the trunk opens as on the bare model, and generation agrees."""
    torch.manual_seed(0)
    model, bare = family(name), open_trunk(family(name)).facts
    LoReFT(positions="f3+l4").attach(model)
    trunk = open_trunk(model)
    facts = trunk.facts
    assert (facts.path, facts.last_layer, facts.head_map) == (bare.path, bare.last_layer, bare.head_map)
    prompts = [torch.randint(3, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 12, 9)]
    made = generate(model, None, prompts, SamplingSpec(max_new_tokens=4))
    samples = [
        Sample((Piece([*p, *a], [0.0] * len(p) + [1.0] * len(a)),), Source("g.jsonl", i + 1), id=i)
        for i, (p, a) in enumerate(zip(prompts, made, strict=True))
    ]
    with torch.no_grad():
        assert trunk.logits(collate(samples)).argmax(-1).tolist() == sum(made, [])
