"""Tokens from a model: greedy or seeded sampling, through transformers' `generate` on the model's own attention.

Whatever a trunk has switched in is switched out for the call, so training and generation share one model, sites
in place. Prompts are sorted by length and run in batches: padded on the left with an attention mask, or, for
families that carry a state along the row and would read the padding, only rows of equal length together.
Sampling draws from a generator of its own state and puts the global one back: it can never shift training.
Left out: many adapters in one batch and continuous batching (serving).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from luthier.contracts.errors import ModelError
from luthier.models.decoder_site import positions_and_rows
from luthier.models.shapes import max_positions
from luthier.models.switch import native_attention

_STATEFUL = ("mamba", "linear_attention", "conv", "recurrent", "hybrid", "sparse")


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How to generate. `temperature` 0 is greedy; `batch` is the most prompts at once."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    batch: int = 16


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Sequence[int]],
    spec: SamplingSpec,
) -> list[list[int]]:
    """New tokens of every prompt, in the order given, without the stop token."""
    if any(not len(prompt) for prompt in prompts):
        raise ModelError("an empty prompt cannot be continued", remedy="begin it with the tokenizer's bos token")
    pad = _pad_id(tokenizer, spec)
    made: list[list[int]] = [[] for _ in prompts]
    with _generating(model, spec.seed):
        for members in _batches([len(prompt) for prompt in prompts], spec.batch, equal=not pads(model)):
            width = max(len(prompts[i]) for i in members)
            ids = torch.full((len(members), width), pad, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(members):
                ids[row, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
                mask[row, width - len(prompts[i]) :] = 1
            out = _call(model, ids, mask, spec, pad)
            for row, i in enumerate(members):
                made[i] = _until_stop(out[row, width:].tolist(), spec.stop_ids)
    return made


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], spec: SamplingSpec
) -> Iterator[str]:
    """Pieces of the answer's text as its tokens come; whole characters only."""
    tokens: list[int] = []
    shown = ""
    for token in stream_tokens(model, tokenizer, prompt, spec):
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if len(text) > len(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if len(text) > len(shown):
        yield text[len(shown) :]


def stream_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, prompt: Sequence[int], spec: SamplingSpec
) -> Iterator[int]:
    """Tokens of one answer as they come, without the stop token. Leaving the loop early ends the generation."""
    arrived: queue.Queue[int | BaseException | None] = queue.Queue()
    gone = threading.Event()
    ids = torch.tensor([list(prompt)])

    def work() -> None:
        try:
            with _generating(model, spec.seed):
                _call(model, ids, torch.ones_like(ids), spec, _pad_id(tokenizer, spec), _Hand(arrived, gone))
            arrived.put(None)
        except _Abandoned:
            arrived.put(None)
        except BaseException as error:  # noqa: BLE001 handed to the reader, who raises it
            arrived.put(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while (item := arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item in spec.stop_ids:
                break
            yield item
    finally:
        gone.set()
        worker.join()


def room(model: nn.Module, prompt_tokens: int, wanted: int) -> int:
    """How many tokens may follow a prompt: what is asked for, as far as the model has positions."""
    most = max_positions(model.config)
    if most is None:
        return wanted
    most -= positions_and_rows(model)[0]
    if prompt_tokens >= most:
        raise ModelError("the prompt leaves no position for an answer", value=f"{prompt_tokens} tokens",
                         remedy=f"the model has {most} positions for text: shorten it")  # fmt: skip
    return min(wanted, most - prompt_tokens)


def pads(model: nn.Module) -> bool:
    """False for families whose layers carry a state along the row: padding on the left would enter it."""
    if getattr(model, "_is_stateful", False):
        return False
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = [str(kind) for name in ("layer_types", "layers_block_type") for kind in getattr(text, name, None) or ()]
    return not any(word in kind for kind in kinds for word in _STATEFUL)


class _Abandoned(Exception):
    pass


class _Hand(BaseStreamer):
    """Passes each new token on; the first call holds the prompt."""

    def __init__(self, arrived: queue.Queue[Any], gone: threading.Event) -> None:
        self.arrived, self.gone, self.prompt = arrived, gone, True

    def put(self, value: Tensor) -> None:
        if self.gone.is_set():
            raise _Abandoned
        if not self.prompt:
            for token in value.flatten().tolist():
                self.arrived.put(token)
        self.prompt = False

    def end(self) -> None:
        return


@contextmanager
def _generating(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Own attention, eval mode, no gradients, a random state of its own; everything put back after."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with native_attention(model), torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _call(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, spec: SamplingSpec, pad: int, hand: BaseStreamer | None = None
) -> Tensor:
    greedy = spec.temperature <= 0
    drawing = {} if greedy else {"temperature": spec.temperature, "top_p": spec.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=spec.max_new_tokens,
        do_sample=not greedy,
        eos_token_id=list(spec.stop_ids) or None,
        pad_token_id=pad,
        use_cache=True,
        **drawing,
    )
    own, model.generation_config = model.generation_config, config
    try:
        return model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config, streamer=hand
        )
    finally:
        model.generation_config = own


def _pad_id(tokenizer: PreTrainedTokenizerBase | None, spec: SamplingSpec) -> int:
    own = None if tokenizer is None else tokenizer.pad_token_id
    return int(own) if own is not None else (spec.stop_ids[0] if spec.stop_ids else 0)


def _batches(lengths: Sequence[int], most: int, equal: bool) -> Iterator[list[int]]:
    """Indices by length, at most `most` at once; `equal`: one length per batch."""
    members: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if len(members) == most or (equal and members and lengths[members[-1]] != lengths[index]):
            yield members
            members = []
        members.append(index)
    if members:
        yield members


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[:place]
    return tokens
