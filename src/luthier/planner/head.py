"""The output matrix's share of a plan: no N x V logits, but tiles or chunks of them (models/logprob_tiles.py).

    frozen head      d logprob / d hidden made in the forward pass: hidden and its derivative, N D each, and one tile
    trained, linear  hidden and its gradient, one chunk of exponentials of all columns, and the gradient of the matrix,
                     which is made in the forward pass. Where gradients lie all the time (models/gradient_room.py) it is
                     among them, and another's memory serves as the chunk if it is large enough
    trained, again   hidden, later its gradient, one tile

On a GPU a chunk is some rows of all columns in the dtype that computes (models/logprob_chunks.py). The sizes come
from the engine's own `tile_for`, asked with a matrix on the meta device.
"""

from __future__ import annotations

import torch

from luthier.models.logprob_tiles import Tile, tile_for
from luthier.planner.activations import FLOAT, Numbers
from luthier.planner.load import Load
from luthier.planner.shape import Form
from luthier.planner.trained import Trained

MODES = ("jacobian", "linear", "again", "scores")


def mode_of(trained: Trained, *, reads: str, linear: bool) -> str:
    """How the log-probabilities' gradient is made, as models/logprobs.py decides it."""
    if reads == "scores":
        return "scores"
    if not trained.head_trains and not (trained.embedding_trains and trained.base_trained):
        return "jacobian"
    return "linear" if linear else "again"


def tile_of(form: Form, device: str) -> Tile:
    """The engine's choice. On a GPU, where the meta device cannot stand in, its second formula."""
    if device == "cpu":
        return tile_for(_OnCpu(form.vocabulary, form.width))  # type: ignore[arg-type]
    return tile_for(torch.empty(form.vocabulary, form.width, device="meta"))


class _OnCpu:
    """As much of a matrix on a CPU as `tile_for` looks at."""

    device = torch.device("cpu")

    def __init__(self, rows: int, columns: int) -> None:
        self._rows, self._columns = rows, columns

    def __len__(self) -> int:
        return self._rows

    def numel(self) -> int:
        return self._rows * self._columns


def head_bytes(form: Form, load: Load, mode: str, numbers: Numbers, device: str, lent: int = 0) -> int:
    """At the end of the forward pass, from the last norm on; `lent`: bytes of another gradient that lie idle."""
    rows, width = load.scored, form.width
    into_norm = load.kept * width * numbers.stream
    if mode == "scores" or not rows:
        return into_norm
    hidden, tile = rows * width * numbers.stream, tile_of(form, device)
    if device != "cpu":
        chunk = min(tile.rows, rows) * form.vocabulary * numbers.compute
        made = rows * width * (FLOAT if mode != "jacobian" else numbers.stream)
        product = form.vocabulary * width * numbers.compute if mode != "jacobian" and numbers.compute < FLOAT else 0
        return into_norm + hidden + made + chunk + product
    if mode == "linear":
        chunk_rows = _even(rows, tile.stored)
        chunk, normed = chunk_rows * form.vocabulary * FLOAT, into_norm
        chunk = 0 if chunk <= lent else chunk
        return into_norm + normed + hidden + rows * width * FLOAT + chunk + 2 * chunk_rows * width * FLOAT
    return into_norm + 2 * hidden + _tile(form, tile, rows)


def evaluation(form: Form, load_tokens: int, device: str, numbers: Numbers) -> int:
    """Log-probabilities without gradients: hidden rows and one tile."""
    tile = tile_of(form, device)
    hidden = load_tokens * form.width * numbers.stream
    if device != "cpu":
        return hidden + min(tile.rows, load_tokens) * form.vocabulary * numbers.compute
    return hidden + min(tile.rows, load_tokens) * min(tile.columns, form.vocabulary) * FLOAT


def standing(form: Form, mode: str, *, in_room: bool) -> int:
    """The head's gradient from the forward pass on, where the gradients do not lie there anyway."""
    return form.vocabulary * form.width * FLOAT if mode == "linear" and not in_room else 0


def _tile(form: Form, tile: Tile, rows: int) -> int:
    rows = min(tile.rows, rows)
    return FLOAT * (rows * min(tile.columns, form.vocabulary) + 3 * rows * form.width)


def _even(rows: int, most: int) -> int:
    return -(-rows // -(-rows // most))
