"""D8: rows a second from conversations to ids and exact mask, beside TRL's tokenising and transformers' own.

Per row, one process, the parts of a contest in turn on slices of the same rows, processor time of each:

    ours        data/batches.py: render, trace, mask, every check of the row, samples as columns
    plain       the same without the word table: every text to the tokenizers library, with offsets
    TRL         what SFTTrainer's `tokenize_fn` calls for a row, with the template that it swaps in (mask by markers)
    template    render and tokenise alone, no mask: our renderer, the tokenizers library

Whole road, wall time, files to ready rows: ours with 0 and 2 worker processes and from the cache; TRL's as
`Dataset.map(tokenize_fn)` with 1 and 2 processes. Ids of ours are compared with TRL's where its template prints the
same text (its Qwen3 prints a thinking block more). The tokenizer is GPT-2's with the template's control tokens.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from bench.data import Figure
from luthier.contracts.record import Chat, Completion
from luthier.data.batches import encode_batch
from luthier.data.detect import records
from luthier.data.encode import Encoder
from luthier.data.prepare import prepare
from luthier.data.source import read_rows
from luthier.data.template import Template
from luthier.recipe.recipe import DataSection, DataSource

try:
    from datasets import Dataset, disable_caching, disable_progress_bars
    from trl.trainer.sft_trainer import _tokenize
except ImportError:
    _tokenize = None

GOALS = ("D8",)
DATA = Path(os.environ.get("LUTHIER_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
SETS = {
    "gsm8k": "gsm8k/train_first.jsonl", "alpaca": "llamafactory/alpaca_en_demo.json",
    "glaive tools": "llamafactory/glaive_toolcall_en_demo.json", "short turns": "fastchat/dummy_conversation.json",
}  # fmt: skip
TEMPLATES = ("trl__qwen2_5", "trl__qwen3", "trl__llama3")
_SLICES = 5
_NO_RIVAL = "trl or datasets is not installed"


@dataclass(frozen=True)
class Lane:
    """One template with its tokenizer, our encoder and the template that TRL swaps in."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    template: Template
    marked: str

    def encoder(self) -> Encoder:
        section = DataSection(train=(DataSource(path="rows.jsonl"),), max_tokens=1 << 20)
        return Encoder(self.tokenizer, self.template, section)


def measure(quick: bool) -> list[Figure]:
    if not (DATA / "raw").is_dir():
        return [Figure("D8", "tokenise and mask", "not measured", "", ">= 1.5x", False, f"no data at {DATA.name}")]
    lanes = [lane(name) for name in (TEMPLATES[:1] if quick else TEMPLATES)]
    found = [figure for one in lanes for name in SETS for figure in _per_row(one, name, 40 if quick else 800)]
    return [*found, *_whole_road(lanes[0], 200 if quick else 20_000, quick)]


def lane(name: str) -> Lane:
    folder = DATA / "raw" / "tokenizers" / "gpt2"
    inner = Tokenizer(BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), Decoder()
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, bos_token=end, unk_token=end)
    text, marked = (
        (DATA / "chat_templates" / f"{stem}.jinja").read_text(encoding="utf-8") for stem in (name, f"{name}_training")
    )
    template = Template(text, {"bos_token": end, "eos_token": end}, name)
    known = tokenizer.get_vocab()
    new = [AddedToken(one, special=True, normalized=False) for one in template.control_strings() if one not in known]
    tokenizer.add_tokens(new)
    tokenizer.chat_template = text
    return Lane(name, tokenizer, template, marked)


def conversations(name: str, limit: int) -> list[Chat]:
    """The first rows of a set as conversations."""
    found = []
    for record in records(read_rows(str(DATA / "raw" / SETS[name]), _refuse), _refuse):
        if isinstance(record, Completion):
            turns = [("user", record.prompt), ("assistant", record.completion)]
            record = Chat([{"role": role, "content": text} for role, text in turns], record.source)
        if isinstance(record, Chat):
            found.append(record)
        if len(found) == limit:
            break
    return found


def _refuse(error: Exception, _: Any) -> None:
    raise error


def _per_row(one: Lane, name: str, limit: int) -> list[Figure]:
    encoder, plain = one.encoder(), one.encoder()
    plain.vocabulary.__dict__["quick"] = None
    answer = encode_batch(encoder, conversations(name, limit))
    chats = [
        chat
        for chat, outcome in zip(conversations(name, limit), answer.outcomes, strict=True)
        if outcome.error is None and outcome.dropped is None
    ]
    if not chats:
        return []

    def trl(rows: Sequence[Chat]) -> list[Any]:
        keep = {"return_assistant_tokens_mask": True, "chat_template": one.marked}
        return [_tokenize(one.tokenizer, list(row.messages), tools=row.tools, **keep) for row in rows]

    def bare(rows: Sequence[Chat]) -> list[Any]:
        encode = one.tokenizer.backend_tokenizer.encode
        return [encode(one.template.render(row.messages, row.tools), add_special_tokens=False).ids for row in rows]

    parts: dict[str, Callable[[Sequence[Chat]], Any]] = {
        "ours": lambda rows: encode_batch(encoder, rows), "plain": lambda rows: encode_batch(plain, rows), "bare": bare,
        **({"trl": trl} if _tokenize else {}),
    }  # fmt: skip
    rate = {part: len(chats) / seconds for part, seconds in in_turn(parts, chats).items()}
    equal = _equal(encoder, trl(chats), chats) if _tokenize else "no rival"
    conditions = f"{one.name}, {len(chats)} rows of {name}, GPT-2, one process, processor time, {equal}"
    said = f"{rate['ours']:,.0f} rows/s (plain way {rate['plain']:,.0f})"
    rival = f"TRL {rate['trl']:,.0f} rows/s" if _tokenize else _NO_RIVAL
    times, cost = rate["ours"] / rate.get("trl", rate["ours"]), rate["bare"] / rate["ours"]
    return [
        Figure("D8", f"{times:.2f}x TRL, row for row", said, rival, ">= 1.5x", times >= 1.5, conditions),
        Figure("D8", f"{cost:.2f}x the cost of render and tokenise", said, f"{rate['bare']:,.0f} rows/s", "<= 2.5x",
               cost <= 2.5, conditions),
    ]  # fmt: skip


def in_turn(parts: dict[str, Callable[[Sequence[Chat]], Any]], rows: Sequence[Chat]) -> dict[str, float]:
    """Processor seconds of each part over all rows, slice by slice in turn, the best of two rounds."""
    best: dict[str, float] = {}
    for _ in range(2):
        spent = dict.fromkeys(parts, 0.0)
        for number in range(_SLICES):
            part_of = rows[number::_SLICES]
            for name, work in parts.items():
                begin = time.process_time()
                work(part_of)
                spent[name] += time.process_time() - begin
        best = {name: min(seconds, best.get(name, seconds)) for name, seconds in spent.items()}
    return best


def _equal(encoder: Encoder, theirs: Sequence[Any], chats: Sequence[Chat]) -> str:
    same = sum(
        encoder.masked(chat).encoded.ids_T.tolist() == list(row["input_ids"])
        for chat, row in zip(chats, theirs, strict=True)
    )
    return "ids equal TRL's in every row" if same == len(chats) else f"ids equal TRL's in {same} rows"


def _whole_road(one: Lane, count: int, quick: bool) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder, _cache_in(folder):
        path = Path(folder) / "rows.jsonl"
        _write(path, count)
        wall = {"here": _ours(one, path, 0, "off"), "two": 0.0 if quick else _ours(one, path, 2, "off")}
        _ours(one, path, 0, 1.0)
        wall["kept"] = _ours(one, path, 0, 1.0)
        theirs = {} if _tokenize is None else {n: _theirs(one, path, n) for n in ((1,) if quick else (1, 2))}
    conditions = f"{one.name}, {count:,} rows of gsm8k, GPT-2, wall time from the file to ready rows"
    figures = []
    for label, processes in (("here", 1), ("two", 2)):
        if not wall[label]:
            continue
        ours, rival = count / wall[label], theirs.get(processes)
        times = rival / wall[label] if rival else 0.0
        figures.append(Figure(
            "D8", f"{times:.2f}x TRL, whole road, {processes} process{'es' * (processes > 1)}", f"{ours:,.0f} rows/s",
            f"TRL {count / rival:,.0f} rows/s" if rival else _NO_RIVAL, ">= 1.5x", times >= 1.5, conditions,
        ))  # fmt: skip
    kept, again = count / wall["kept"], wall["here"] / wall["kept"]
    said = f"{again:,.0f}x the first time, from the cache"
    return [*figures, Figure("D8", said, f"{kept:,.0f} rows/s", "", "> 1x", again > 1, conditions)]


def _write(path: Path, count: int) -> None:
    """So many conversations, each its own."""
    chats = conversations("gsm8k", min(count, 5000))
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            question, answer = chats[i % len(chats)].messages
            asked = {"role": "user", "content": f"{question['content']} (case {i})"}
            file.write(json.dumps({"messages": [asked, dict(answer)]}) + "\n")


def _ours(one: Lane, path: Path, workers: int, cache: Any) -> float:
    section = DataSection(train=(DataSource(path=str(path)),), max_tokens=1 << 20, workers=workers, cache=cache)
    encoder = Encoder(one.tokenizer, one.template, section)
    begin = time.perf_counter()
    prepare(section, encoder, seed=0)
    return time.perf_counter() - begin


def _theirs(one: Lane, path: Path, processes: int) -> float:
    """As SFTTrainer prepares a set of conversations: a table, then `map` over its rows."""
    disable_caching()
    disable_progress_bars()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        table = Dataset.from_json(str(path), cache_dir=home)
        table.map(
            _tokenize_row, fn_kwargs={"tokenizer": one.tokenizer, "marked": one.marked}, keep_in_memory=processes == 1,
            num_proc=processes if processes > 1 else None, remove_columns=["messages"],
        )  # fmt: skip
    return time.perf_counter() - begin


def _tokenize_row(example: dict[str, Any], tokenizer: Any, marked: str) -> dict[str, Any]:
    made = _tokenize(
        tokenizer, example["messages"], return_assistant_tokens_mask=True, chat_template=marked, tools=None
    )
    return {name: made[name] for name in ("input_ids", "assistant_masks")}


@contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = folder
    try:
        yield
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before
