"""One training step, flat: everything the engine does to the weights, with nothing but PyTorch.

    L = - sum_n w_n log p(y_n | y_<n) / sum_n w_n     over all rows of the step
    g = dL/dp, scaled to norm <= max_norm             one norm over all parameters
    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2       AdamW with bias correction and decoupled decay
    p = p (1 - lr wd) - lr mhat / (sqrt(vhat) + eps)

Rows run one at a time through the model's own attention: no packing, no fused log-probabilities, no precision but
fp32. tests/examples holds the engine's step to this one, weight by weight. `python examples/one_step.py` shows a loss
that falls. Leaves out what does not change the numbers: events, checkpoints, memory, devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Row = tuple[list[int], list[float]]  # token ids, and the loss weight of each token (0: context only)


@dataclass
class AdamW:
    """Settings, and the two averages of each parameter by name."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    steps: int = 0
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def one_step(
    model: nn.Module, rows: list[Row], adamw: AdamW, rate: float, max_norm: float = 1.0
) -> tuple[float, float]:
    """(loss, gradient norm before clipping); the model's trainable parameters have moved one step."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    # The divisor belongs to the whole step and is known before the first forward pass.
    weight = sum(sum(weights[1:]) for _, weights in rows)
    loss = 0.0
    for ids, weights in rows:
        ids_T, weights_T = torch.tensor(ids), torch.tensor(weights)
        logits_TV = model(input_ids=ids_T[None]).logits[0].float()
        logprobs_T = logits_TV[:-1].log_softmax(-1).gather(-1, ids_T[1:, None])[:, 0]
        total = -(weights_T[1:] * logprobs_T).sum() / weight
        total.backward()
        loss += total.item()

    norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in trained.values() if p.grad is not None))
    if not math.isfinite(loss + norm):
        raise FloatingPointError("loss or gradient is not finite: the engine would skip this step, nothing updated")
    scale = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0

    adamw.steps += 1
    b1, b2 = adamw.betas
    with torch.no_grad():
        for name, p in trained.items():
            if p.grad is None:
                continue
            g = p.grad * scale
            m, v = adamw.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            adamw.moments[name] = m, v
            m_hat, v_hat = m / (1 - b1**adamw.steps), v / (1 - b2**adamw.steps)
            decay = adamw.weight_decay if p.ndim > 1 else 0.0  # norms and biases are not pulled to zero
            p.mul_(1 - rate * decay).sub_(rate * m_hat / (v_hat.sqrt() + adamw.eps))
            p.grad = None
    return loss, norm


def cosine(step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate at step 1..steps: linear warm-up, then half a cosine."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps + 1 - warmup)))


def main() -> None:
    """A random tiny Llama learns to repeat what it was shown."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=4, tie_word_embeddings=False, **shape))
    rows: list[Row] = []
    for _ in range(16):
        shown = torch.randint(2, 64, (5,)).tolist()
        rows.append(([1, *shown, *shown], [0.0] * 6 + [1.0] * 5))
    adamw, steps = AdamW(), 40
    for step in range(1, steps + 1):
        loss, norm = one_step(model, rows, adamw, rate=5e-3 * cosine(step, steps, warmup=4))
        if step % 10 == 0 or step == 1:
            print(f"step {step:3d}  loss {loss:.4f}  gradient norm {norm:.3f}")


if __name__ == "__main__":
    main()
