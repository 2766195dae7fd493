"""NEFTune: transformers' hook with the same draws, each row's own length in a pack, and only where it is meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from luthier.contracts.batch import Forest
from luthier.contracts.errors import RecipeError
from luthier.contracts.record import Piece, Sample, Source
from luthier.contracts.regularizer import NOISE
from luthier.data.collate import collate
from luthier.engine.journal import read
from luthier.engine.loop import train
from luthier.engine.modes import at_rest, train_mode
from luthier.methods.full import Full
from luthier.methods.lora import LoRA
from luthier.methods.prompt import PromptTuning
from luthier.models.attention import forest_context
from luthier.models.probe import open_trunk
from luthier.models.token_rows import attach_rows
from luthier.regularizers.neftune import NEFTune, longest_paths, noisy
from regularizers.rig import build
from tiny import tiny

TOKENS = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(3))
TREE = Forest((0, 4, 6, 9, 12), (4, 6, 9, 12, 17), (-1, 0, 0, 2, -1))  # 4 + 2, 4 + 3 + 3, and 5 alone


def embedded(model: nn.Module, tokens: Tensor = TOKENS, seed: int = 7) -> Tensor:
    torch.manual_seed(seed)
    return model.get_input_embeddings()(tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padded_is_the_hook_of_transformers(family: str) -> None:
    ours, theirs = tiny(family).train(), tiny(family).train()
    NEFTune(alpha=10.0, length="padded").attach(ours)
    embedding = theirs.get_input_embeddings()
    embedding.neftune_noise_alpha = 10.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    torch.testing.assert_close(embedded(ours), embedded(theirs), atol=1e-6, rtol=1e-6)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_the_formula_with_fixed_noise() -> None:
    e = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    u = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    lengths = torch.tensor([[5] * 5, [3] * 5])
    made = noisy(e, u, 5.0, lengths)
    for row, length in enumerate((5, 3)):
        torch.testing.assert_close(made[row], e[row] + u[row] * 5.0 / (length * 8) ** 0.5)
    assert noisy(e.bfloat16(), u, 5.0, lengths).dtype == torch.bfloat16


def test_longest_paths_of_a_tree() -> None:
    assert longest_paths(TREE) == [10, 6, 10, 10, 5]
    assert longest_paths(Forest((0, 3), (3, 5), (-1, -1))) == [3, 2]


@pytest.mark.parametrize(("length", "sizes"), [("true", [10, 6, 10, 10, 5]), ("padded", [10] * 5)])
def test_packed_rows_have_the_noise_of_their_own_length(length: str, sizes: list[int]) -> None:
    model = tiny().train()
    tokens = torch.randint(0, 256, (1, TREE.tokens), generator=torch.Generator().manual_seed(2))
    plain = model.get_input_embeddings()(tokens)
    NEFTune(alpha=5.0, length=length).attach(model)
    with forest_context(TREE):
        noise = (embedded(model, tokens) - plain)[0]
    torch.manual_seed(7)
    u = torch.empty(1, TREE.tokens, 64).uniform_(-1, 1)[0]
    for segment, size in enumerate(sizes):
        part = slice(TREE.start[segment], TREE.end[segment])
        torch.testing.assert_close(noise[part], u[part] * 5.0 / (size * 64) ** 0.5, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["forest", "unpacked"])
def test_through_the_trunk_every_row_has_its_length(attention: str) -> None:
    """The standard deviation of U(-1, 1) alpha / sqrt(S h) is that over sqrt(3), on either path."""
    model = tiny().train()
    trunk = open_trunk(model, attention=attention)
    seen: list[tuple[Tensor, Tensor]] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, out: seen.append((args[0], out.detach())) or None)
    NEFTune(alpha=5.0).attach(model)
    embedding.register_forward_hook(lambda module, args, out: seen.append((args[0], out.detach())) or None)
    rows = [Sample((Piece([1] * n, [0.0] + [1.0] * (n - 1)),), Source("r", n), id=n) for n in (64, 16)]
    trunk.logprobs(collate(rows))
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    noise = {
        n: torch.cat([(b[1] - a[1]).flatten(0, 1)[-n:] if attention == "unpacked" else (b[1] - a[1])[0, at : at + n]
                      for a, b in pairs if attention == "forest" or a[0].shape[1] == n])
        for n, at in ((64, 0), (16, 64))
    }  # fmt: skip
    for n, found in noise.items():
        assert float(found.std()) == pytest.approx(5.0 / (n * 64) ** 0.5 / 3**0.5, rel=0.1)


def test_none_in_eval_none_at_rest_and_on_without_dropout() -> None:
    model = tiny()
    plain = embedded(model)
    NEFTune().attach(model)
    assert torch.equal(embedded(model), plain)
    train_mode(model, dropout=False)
    assert not torch.equal(embedded(model), plain)
    assert not model.model.layers[0].training
    with at_rest(model):
        assert torch.equal(embedded(model), plain)
    assert not torch.equal(embedded(model), plain)


def test_noise_is_the_steps_own() -> None:
    model = tiny().train()
    NEFTune().attach(model)
    assert torch.equal(embedded(model, seed=1), embedded(model, seed=1))
    assert not torch.equal(embedded(model, seed=1), embedded(model, seed=2))


@pytest.mark.parametrize("kind", ["rows", "lora", "saved"])
def test_it_lies_over_whatever_stands_at_the_embedding(kind: str) -> None:
    model = tiny()
    saved = {"modules_to_save": ("embed_tokens",)} if kind == "saved" else {}
    targets = ("embed_tokens", "q_proj") if kind == "lora" else ("q_proj",)
    LoRA(r=2, target_modules=targets, init_lora_weights=False, **saved).attach(model)
    if kind == "rows":
        attach_rows(model, [290, 291])
    model.train()
    before = embedded(model)
    one = NEFTune()
    one.attach(model)
    noise = embedded(model) - before
    torch.manual_seed(7)
    u = torch.empty(3, 9, 64).uniform_(-1, 1)
    torch.testing.assert_close(noise, u * 5.0 / (9 * 64) ** 0.5, atol=1e-6, rtol=1e-5)
    one.detach(model)
    assert torch.equal(embedded(model), before)


@pytest.mark.parametrize("attention", ["forest", "unpacked"])
def test_virtual_tokens_get_none_and_are_not_counted(attention: str) -> None:
    model = tiny()
    PromptTuning(num_virtual_tokens=3).attach(model)
    trunk = open_trunk(model, attention=attention)
    seen: list[Tensor] = []
    embedding = model.get_input_embeddings()
    for _ in range(2):
        embedding.register_forward_hook(lambda module, args, out: seen.append(out.detach()) or None)
        if not hasattr(embedding, NOISE):
            NEFTune(alpha=5.0).attach(model)
    model.train()
    torch.manual_seed(7)
    trunk.logprobs(collate([Sample((Piece([1] * 12, [0.0] + [1.0] * 11),), Source("r", 1), id=0)]))
    before, after = seen
    torch.manual_seed(7)
    u = torch.empty(1, 12, 64).uniform_(-1, 1)
    torch.testing.assert_close(after - before, u * 5.0 / (12 * 64) ** 0.5, atol=1e-6, rtol=1e-5)


def test_a_tied_head_gets_no_noise() -> None:
    model = tiny(tie_word_embeddings=True).train()
    hidden = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1))
    before = model.get_output_embeddings()(hidden)
    NEFTune().attach(model)
    assert torch.equal(model.get_output_embeddings()(hidden), before)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_recompute_draws_the_same_noise(tmp_path: Path) -> None:
    """Losses and norms of every step: other noise in the second pass would show in the first step's norm."""
    rows = []
    for recompute in (False, True):
        directory = tmp_path / str(recompute)
        run = build(directory, [NEFTune(alpha=50.0)], steps=4, checkpoint_activations=recompute, evaluation=0)
        list(train(run))
        rows.append(
            [(row["loss"], row["grad_norm"]) for row in read(directory / "journal.jsonl") if row["event"] == "step"]
        )
    torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), atol=1e-5, rtol=1e-4)


def test_twice_is_refused_and_so_is_no_size() -> None:
    model = tiny()
    Full().attach(model)
    NEFTune().attach(model)
    with pytest.raises(RecipeError, match="noise already"):
        NEFTune().attach(model)
    for wrong in ({"alpha": 0.0}, {"alpha": float("inf")}, {"length": "long"}):
        with pytest.raises(RecipeError, match="regularizers"):
            NEFTune(**wrong)
