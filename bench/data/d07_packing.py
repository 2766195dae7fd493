"""D7: how full packed rows are, beside TRL's `pack_dataset("bfd")` on the same samples, and that no row sees another.

fill      tokens / (packed rows * 2048), of gsm8k and alpaca conversations under ChatML, in GPT-2's words
stream    the same of a run's own microbatches: best fit within steps of 16,384 tokens drawn from a shuffled window
once      every token of every sample stands in exactly one packed row, read back by `unpack`
apart     largest difference of any logit, packed beside the row alone through transformers' own forward pass
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from bench.data import Figure
from luthier.contracts.record import Chat, Sample, Source
from luthier.data.collate import collate, unpack
from luthier.data.encode import Encoder
from luthier.data.ledger import Dropped
from luthier.data.pack import pack
from luthier.data.stream import Stream, StreamSpec
from luthier.data.template import open_template
from luthier.models.load import load_model
from luthier.models.probe import open_trunk
from luthier.recipe.recipe import ModelSection

try:
    import datasets
    from trl import pack_dataset
except ImportError:
    pack_dataset = None

GOALS = ("D7",)
_ROOT = Path(__file__).resolve().parents[2]
_DATA = Path(os.environ.get("LUTHIER_TEST_DATA", _ROOT.parent / "shared" / "data"))
_ROOM = 2048


@dataclass(frozen=True)
class _Mask:
    roles: tuple[str, ...] = ("assistant",)
    last_turn_only: bool = False
    thinking: str = "as_template"
    train_generation_prompt: bool = False


@dataclass(frozen=True)
class _Section:
    max_tokens: int = _ROOM
    overlong: str = "drop"
    injection: str = "escape"
    mask: _Mask = field(default_factory=_Mask)


def measure(quick: bool) -> list[Figure]:
    if not _DATA.is_dir():
        return [Figure("D7", "packing", "not measured", "", "", False, f"no data at {_DATA.name}")]
    samples = list(_samples(200 if quick else None))
    conditions = f"{len(samples)} gsm8k and alpaca rows of {sum(s.length for s in samples):,} tokens, rows of {_ROOM}"
    return [*_packed(samples, conditions), _streamed(samples, conditions), _apart(12 if quick else 60)]


def _packed(samples: Sequence[Sample], conditions: str) -> list[Figure]:
    lengths = [sample.length for sample in samples]
    bins = pack(lengths, _ROOM)
    fill = sum(lengths) / (len(bins) * _ROOM)
    theirs, rows = _rival(samples)
    given, back = Counter(tuple(_ids(sample)) for sample in samples), Counter[tuple[int, ...]]()
    for members in bins:
        batch = collate([samples[i] for i in members])
        back.update(tuple(_ids(sample)) for sample in unpack(batch))
    once = given == back and sorted(i for members in bins for i in members) == list(range(len(samples)))
    return [
        Figure("D7", "fill of packed rows", f"{fill:.2%}", f"TRL bfd {theirs:.2%}" if rows else "TRL is not installed",
               "98 %, and no emptier than TRL", fill >= 0.98 and fill >= theirs - 1e-9, conditions),
        Figure("D7", "packed rows", str(len(bins)), f"TRL bfd {rows}" if rows else "TRL is not installed",
               "no more than TRL", not rows or len(bins) <= rows, conditions),
        Figure("D7", "samples read back from packed rows, each once", f"{sum(back.values())} of {len(samples)}", "",
               "all", once, conditions),
    ]  # fmt: skip


def _rival(samples: Sequence[Sample]) -> tuple[float, int]:
    """Fill and rows of TRL's packing; (0, 0) where it is not installed."""
    if pack_dataset is None:
        return 0.0, 0
    datasets.disable_progress_bars()
    given = datasets.Dataset.from_dict({"input_ids": [_ids(sample) for sample in samples]})
    rows = pack_dataset(given, _ROOM, "bfd")
    return sum(map(len, rows["input_ids"])) / (len(rows) * _ROOM), len(rows)


def _streamed(samples: Sequence[Sample], conditions: str) -> Figure:
    stream = Stream(samples, StreamSpec(tokens_per_step=16384, microbatch_tokens=_ROOM))
    fill = stream.fill()
    return Figure("D7", "fill of a run's microbatches over an epoch", f"{fill:.2%}", "", "98 %", fill >= 0.98,
                  f"{conditions}; steps of 16,384 tokens, shuffled in windows of {stream.spec.window}")  # fmt: skip


def _apart(rows: int) -> Figure:
    """Packed conversations through our forward pass, each alone through the model's own."""
    section = ModelSection(path=str(_DATA / "models" / "stories260K-chatml"))
    loaded = load_model(section, dtype=torch.float32)
    encoder = Encoder(loaded.tokenizer, open_template(None, loaded.tokenizer), _Section(max_tokens=512))
    samples = [made for row in _alpaca(4 * rows) for made in _encoded(encoder, row)][:rows]
    model = loaded.model.eval()
    with torch.no_grad():
        alone = {i: model(input_ids=torch.tensor([_ids(s)]), use_cache=False).logits[0] for i, s in enumerate(samples)}
    trunk = open_trunk(model)
    largest = 0.0
    for members in pack([sample.length for sample in samples], _ROOM):
        batch = collate([samples[i] for i in members])
        with torch.no_grad():
            logits_NV = trunk.logits(batch)
        starts = [0]
        for i in members:
            starts.append(starts[-1] + samples[i].length)
        expected_TV = torch.cat([alone[i] for i in members])
        largest = max(largest, float((logits_NV - expected_TV[batch.scored_N]).abs().max()))
    path = trunk.path
    trunk.close()
    return Figure("D7", "largest difference of a logit, packed beside alone", f"{largest:.1e}", "", "1e-5",
                  largest <= 1e-5 and path == "forest",
                  f"stories260K, {len(samples)} alpaca rows in packed rows of {_ROOM}, path {path}")  # fmt: skip


def _samples(limit: int | None) -> Iterator[Sample]:
    folder = _DATA / "raw" / "tokenizers" / "gpt2"
    words = ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    encoder = Encoder(tokenizer, open_template(None, tokenizer, "chatml"), _Section())
    for row in (*_gsm8k(limit), *_alpaca(limit)):
        yield from _encoded(encoder, row)


def _encoded(encoder: Encoder, row: Chat) -> list[Sample]:
    try:
        return encoder.samples(row)
    except Dropped:
        return []


def _gsm8k(limit: int | None) -> Iterator[Chat]:
    path = _DATA / "raw" / "gsm8k" / "train_first.jsonl"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:limit], 1):
        row = json.loads(line)
        yield _chat(row["question"], row["answer"], Source(path.name, number))


def _alpaca(limit: int | None) -> Iterator[Chat]:
    path = _DATA / "raw" / "llamafactory" / "alpaca_en_demo.json"
    for number, row in enumerate(json.loads(path.read_text(encoding="utf-8"))[:limit], 1):
        asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        yield _chat(asked, row["output"], Source(path.name, number))


def _chat(question: str, answer: str, source: Source) -> Chat:
    return Chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], source)


def _ids(sample: Sample) -> list[int]:
    return [int(token) for piece in sample.pieces for token in piece.tokens]
