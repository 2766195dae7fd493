"""Texts as points of a sphere, by a model in a directory: what semantic duplicates and diversity are measured with.

    static     a model2vec directory: a vector for each token, their mean; no torch, thousands of rows a second
    encoder    a Hugging Face or sentence-transformers encoder: the mean of its last hidden states, or the first token's
               where `1_Pooling/config.json` says so. One row at a time: padding and batching would change the last
               digits of a row by the rows that happen to stand beside it

    embedder = open_embedder("potion-base-8M", "data.steps.semantic_dedup.model")
    points_BD = embedder.embed(["one text", "another"])          float32, each of length 1; 0 where there is no meaning

A static model of one language is blind to others: Chinese rows would all lie together, and most leave as duplicates of
the rest. So a text of which it does not know more than a tenth of the tokens has no meaning to it: 0, as has no text.

A name that is no directory is looked up in the local hub cache; nothing is ever downloaded. Only JSON and safetensors
are read. Static models read the whole text, encoders the first `max_position_embeddings` tokens. Leaves out: remote
endpoints, prompts that some encoders want before the text, and projections behind the pooling (refused by name).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.errors import RecipeError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_READ = ("*.json", "*.safetensors", "1_Pooling/config.json", "vocab.txt", "*.model")
_JOINS = re.compile("[\x0b\x0c\x1c-\x1f\x85]")  # white space to Python that BERT's tokenizer takes away without a cut
_REMEMBERED = 1 << 17  # words whose tokens are kept; then all are forgotten and cut again
_UNREAD = 0.1  # share of unknown tokens from which a text is not read (English files: 0.03 at most, Chinese: 0.08 up)
_MODULES = ("Transformer", "Pooling", "Normalize", "StaticEmbedding")


class Embedder(Protocol):
    """Texts to points."""

    width: int

    def embed(self, texts: Sequence[str]) -> NDArray[Any]: ...


def open_embedder(model: str | None, where: str) -> Embedder:
    """The embedder of a directory. `where` is the recipe path of the field that names it."""
    directory = find_model(model, where)
    config = _config(directory, where)
    modules = _modules(directory, where)
    if config.get("model_type") == "model2vec" or "StaticModel" in (config.get("architectures") or ()):
        return Static(directory, where)
    if "StaticEmbedding" in modules:
        raise RecipeError("a static model in the layout of sentence-transformers is not read", where=where,
                          value=str(directory), remedy="give a directory in the layout of model2vec")  # fmt: skip
    return Encoder(directory, where)


def find_model(model: str | None, where: str) -> Path:
    """The directory of a model: a path, or a hub id that the local cache holds."""
    if not model:
        raise RecipeError(
            "this step measures meaning and needs a model for it", where=where,
            remedy="give a directory with a model2vec model or an encoder, such as ./potion-base-8M "
            "(fetched once with `hf download minishlab/potion-base-8M --local-dir potion-base-8M`)",
        )  # fmt: skip
    local = Path(model).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or local.exists() or not _HUB_ID.fullmatch(model):
        raise RecipeError("no such directory", where=where, value=model,
                          remedy="give a directory with a model2vec model or an encoder")  # fmt: skip
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        raise RecipeError("no such directory, and the local hub cache does not hold a model of this name", where=where,
                          value=model, remedy=f"fetch it once with `hf download {model}`, or give the path of a "
                          "directory") from None  # fmt: skip


def model_files(model: str | None, where: str) -> tuple[str, ...]:
    """The files that decide what the embedder does."""
    directory = find_model(model, where)
    return tuple(sorted({str(file) for pattern in _READ for file in directory.glob(pattern) if file.is_file()}))


class Static:
    """A model2vec model: the mean of its tokens' vectors.

    A tokenizer of BERT's kind cuts at white space before all else, so each word is cut once and remembered: the same
    tokens (a test), four times as fast. Others take each text whole.
    """

    def __init__(self, directory: Path, where: str) -> None:
        from model2vec import StaticModel

        _safe(directory, where)
        try:
            model = StaticModel.from_pretrained(str(directory), force_download=False, max_length=None)
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(directory, where, error) from None
        self.width = int(model.dim)
        self._table_VD = model.embedding
        if model.token_mapping is not None:
            self._table_VD = self._table_VD[model.token_mapping]
        if model.weights is not None:
            self._table_VD = self._table_VD.astype(np.float32) * model.weights[:, None].astype(np.float32)
        self._tokens = _Tokens(model.tokenizer)
        self._unknown = -1 if model.unk_token_id is None else int(model.unk_token_id)
        kind = json.loads(model.tokenizer.to_str()).get("pre_tokenizer") or {}
        self._by_word = kind.get("type") == "BertPreTokenizer"

    def embed(self, texts: Sequence[str]) -> NDArray[Any]:
        points_BD = np.zeros((len(texts), self.width))
        if len(self._tokens) > _REMEMBERED:
            self._tokens.clear()
        for row, text in enumerate(texts):
            tokens = self.tokens(_encodable(text))
            unknown = tokens.count(self._unknown)
            if unknown > _UNREAD * len(tokens):
                continue
            if unknown:
                tokens = [token for token in tokens if token != self._unknown]
            if tokens:
                points_BD[row] = self._table_VD[tokens].sum(axis=0, dtype=np.float32)
        return on_sphere(points_BD)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, unknown ones too."""
        if self._by_word and not _JOINS.search(text):
            return list(chain.from_iterable(map(self._tokens.__getitem__, text.split())))
        return self._tokens.cut(text)


class _Tokens(dict[str, list[int]]):
    """Word -> its tokens."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def cut(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def __missing__(self, word: str) -> list[int]:
        made = self[word] = self.cut(word)
        return made


class Encoder:
    """A transformer that was trained to embed, through transformers."""

    def __init__(self, directory: Path, where: str) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        _safe(directory, where)
        self._torch = torch
        self._first = _first_token(directory, where)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
            self._model = AutoModel.from_pretrained(
                str(directory), local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(directory, where, error) from None
        self.width = int(self._model.config.hidden_size)
        limits = (self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", None))
        self._longest = min(limit for limit in (*limits, 1 << 20) if limit)

    def embed(self, texts: Sequence[str]) -> NDArray[Any]:
        points_BD = np.zeros((len(texts), self.width), np.float32)
        with self._torch.inference_mode():
            for row, text in enumerate(texts):
                if not text.strip():
                    continue
                tokens = self._tokenizer(
                    _encodable(text), return_tensors="pt", truncation=True, max_length=self._longest
                )
                hidden_TD = self._model(**tokens).last_hidden_state[0]
                points_BD[row] = (hidden_TD[0] if self._first else hidden_TD.mean(dim=0)).numpy()
        return on_sphere(points_BD)


def on_sphere(points_BD: NDArray[Any]) -> NDArray[Any]:
    """Each row divided by its length: float32. Rows of zeros stay."""
    points_BD = points_BD.astype(np.float64)
    lengths_B = np.sqrt((points_BD**2).sum(axis=1, keepdims=True))
    return (points_BD / np.where(lengths_B > 0, lengths_B, 1)).astype(np.float32)


def _encodable(text: str) -> str:
    """Lone surrogates are no text for a tokenizer."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _config(directory: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise RecipeError(
            "no config.json that can be read: not a directory of a model", where=where, value=str(directory),
            remedy="give a directory in the layout of model2vec or Hugging Face",
        )  # fmt: skip
    if "auto_map" in config:
        raise RecipeError("this model brings code of its own, which is never run", where=where, value=str(directory),
                          remedy="give a model of a family that transformers knows")  # fmt: skip
    return config


def _modules(directory: Path, where: str) -> list[str]:
    """Kinds of the modules of a sentence-transformers directory; none for others."""
    file = directory / "modules.json"
    if not file.is_file():
        return []
    kinds = [str(module["type"]).rpartition(".")[2] for module in json.loads(file.read_text("utf-8"))]
    unknown = [kind for kind in kinds if kind not in _MODULES]
    if unknown:
        raise RecipeError("this model ends in a module that is not read", where=where, value=unknown[0],
                          remedy="give a model of a transformer with mean or first-token pooling")  # fmt: skip
    return kinds


def _first_token(directory: Path, where: str) -> bool:
    file = directory / "1_Pooling" / "config.json"
    if not file.is_file():
        return False
    modes = [name for name, on in json.loads(file.read_text("utf-8")).items() if name.startswith("pooling_mode") and on]
    if modes not in (["pooling_mode_mean_tokens"], ["pooling_mode_cls_token"]):
        raise RecipeError("this pooling is not read", where=where, value=", ".join(modes),
                          remedy="give a model with mean or first-token pooling")  # fmt: skip
    return modes == ["pooling_mode_cls_token"]


def _safe(directory: Path, where: str) -> None:
    if not any(directory.glob("*.safetensors")):
        raise RecipeError("no safetensors in this directory; other weights can hold code and are not read",
                          where=where, value=str(directory), remedy="convert the weights to safetensors")  # fmt: skip


def _unreadable(directory: Path, where: str, error: Exception) -> RecipeError:
    return RecipeError(f"this model cannot be read: {type(error).__name__}", where=where, value=str(directory),
                       remedy="fetch it again, whole: configuration, tokenizer and weights")  # fmt: skip
