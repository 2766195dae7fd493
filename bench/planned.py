"""Bytes of one microbatch's forward and backward, planned from shapes alone: LoRA on a Llama in fp32.

    activations  for each token and layer what the backward reads: 8 of width D (the layer's input and its middle,
                 both norms before and after their weight, queries, attention's output), 3 of the keys' width (keys
                 before and after rotation, values), 4 of the MLP's width F (gate, its activation, up, the product)
                 and 9 of rank R (what each adapter shrank to, and the same again in flight)
    in flight    gradients through one layer: 4 of D, 2 of F for each token
    head         hidden rows of the scored tokens, their derivative and their gradient, 3 D each; one chunk of logits
    gradients    of the adapters, once
An upper bound: what fused operations spare is below it. Weights and optimizer state are not in it.
"""

from __future__ import annotations

from bench.work import R

CHUNK_ROWS = 256
_BYTES = 4
_WIDTHS, _NARROWS, _FFNS, _RANKS, _HEAD_ROWS = 8, 3, 4, 9, 3
_WIDTHS_IN_FLIGHT, _FFNS_IN_FLIGHT = 4, 2


def planned_bytes(shape: dict[str, int], tokens: int, scored: int) -> int:
    """Above the weights, for a microbatch of `tokens`."""
    width, ffn, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    narrow = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    token = _WIDTHS * width + _NARROWS * narrow + _FFNS * ffn + _RANKS * R
    adapters = layers * R * (2 * (width + width) + 2 * (width + narrow) + 3 * (width + ffn))
    flight = tokens * (_WIDTHS_IN_FLIGHT * width + _FFNS_IN_FLIGHT * ffn)
    floats = tokens * layers * token + flight + scored * _HEAD_ROWS * width + adapters
    return _BYTES * floats + chunk_bytes(shape, scored)


def chunk_bytes(shape: dict[str, int], scored: int) -> int:
    """One chunk of float32 logits."""
    return _BYTES * min(CHUNK_ROWS, scored) * shape["vocab_size"]
