"""Which method and which objective: decision trees as tables, each leaf with its reason and its line of a recipe.

    method     need to tune? -> compute? -> rows beyond 100,000 and compute -> full; one GPU -> LoRA or QLoRA; several
               tasks served -> adapters kept apart; no latency -> merged; below 16 GB -> QLoRA; a large step of domain
               -> full or a high rank
    objective  pairs -> DPO, noisy ones IPO; thumbs -> KTO; simplest -> SimPO or ORPO; reasoning -> GRPO; strongest ->
               PPO; online -> online DPO

methods.md F7. The first rule that holds gives the leaf; the rest of those that hold are told as options. What this
version cannot train is named as what it is, not replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from luthier.contracts.errors import UsageError

MANY_ROWS = 100_000
SMALL_GPU = 16.0  # GB
LARGE_GPU = 48.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What a person says about the task; None and False: nothing said."""

    tune: bool = True  # prompts and retrieval were tried and do not do
    rows: int = 0
    gpu_gb: float = 0.0  # memory of one GPU; 0 is none
    gpus: int = 1
    tasks: int = 1  # served side by side
    zero_latency: bool = False
    domain_gap: bool = False
    pairs: bool = False
    thumbs: bool = False
    noisy: bool = False
    simplest: bool = False
    reasoning: bool = False
    strongest: bool = False
    online: bool = False
    dialogue: bool = False  # ordinary chat, where a chat model is the better start

    @property
    def compute(self) -> bool:
        """Enough for every weight of a model of some billions."""
        return self.gpus > 1 or self.gpu_gb > LARGE_GPU


@dataclass(frozen=True, slots=True)
class Leaf:
    name: str
    recipe: str  # overrides, or empty where no recipe does it
    why: str


Rule = tuple[Callable[[Facts], bool], Leaf]

QLORA = "method.name=lora model.quantization=nf4"
METHOD: tuple[Rule, ...] = (
    (lambda f: not f.tune, Leaf("prompting or retrieval", "", "nothing has to be trained")),
    (lambda f: f.tasks > 1, Leaf("lora, kept apart", "method.name=lora", "adapters of many tasks share one base")),
    (lambda f: f.zero_latency and not (f.rows > MANY_ROWS and f.compute),
     Leaf("lora, merged", "method.name=lora", "luthier merge: the merged model costs nothing more to serve")),
    (lambda f: f.rows > MANY_ROWS and f.compute, Leaf("full", "method.name=full", "rows and compute for every weight")),
    (lambda f: f.domain_gap and f.compute, Leaf("full", "method.name=full", "a large step of domain, and the compute")),
    (lambda f: f.domain_gap and f.gpu_gb >= SMALL_GPU,
     Leaf("lora, high rank", "method.name=lora method.r=128", "a large step of domain wants rank")),
    (lambda f: f.gpu_gb < SMALL_GPU, Leaf("qlora", QLORA, "the base in 4 bits is what fits")),
    (lambda f: not f.compute, Leaf("lora or qlora", "method.name=lora", "one GPU; qlora where the plan does not fit")),
    (lambda f: True, Leaf("lora or dora", "method.name=lora", "up to 100,000 rows adapters do as well as full")),
)  # fmt: skip
OBJECTIVE: tuple[Rule, ...] = (
    (lambda f: f.reasoning, Leaf("grpo", "", "answers that can be checked reward themselves")),
    (lambda f: f.online, Leaf("online dpo", "", "pairs are made and judged while training goes on")),
    (lambda f: f.strongest, Leaf("ppo", "", "a reward model and its policy: the most work and the highest ceiling")),
    (lambda f: f.thumbs and not f.pairs, Leaf("kto", "objective.name=kto", "single answers with a verdict")),
    (lambda f: f.pairs and f.noisy, Leaf("ipo", "objective.name=dpo objective.loss_type=ipo", "noisy pairs")),
    (lambda f: f.pairs and f.simplest, Leaf("simpo or orpo", "objective.name=simpo", "no reference model")),
    (lambda f: f.pairs, Leaf("dpo", "objective.name=dpo", "pairs of a better and a worse answer")),
    (lambda f: True, Leaf("sft", "objective.name=sft", "rows that show what is wanted")),
)  # fmt: skip
START: tuple[Rule, ...] = (
    (lambda f: f.dialogue and f.rows <= MANY_ROWS,
     Leaf("chat model", "", "few rows: it talks already, and its template comes along")),
    (lambda f: True, Leaf("base model", "", "its habits are still yours to choose")),
)  # fmt: skip
TREES: Mapping[str, tuple[Rule, ...]] = {"method": METHOD, "objective": OBJECTIVE, "start": START}


def advise(facts: Facts) -> dict[str, list[Leaf]]:
    """Tree -> its leaf, then the other leaves whose rules hold."""
    return {name: [leaf for holds, leaf in rules[:-1] if holds(facts)] or [rules[-1][1]]
            for name, rules in TREES.items()}  # fmt: skip


def facts_of(words: Mapping[str, str]) -> Facts:
    """From `rows=5000 gpu_gb=24 pairs=yes`."""
    kinds = {field.name: type(field.default) for field in fields(Facts)}
    given: dict[str, Any] = {}
    for name, word in words.items():
        if name not in kinds:
            raise UsageError("no such fact", where="--advise", value=name, remedy=f"one of {', '.join(kinds)}")
        given[name] = _read(name, word, kinds[name])
    return Facts(**given)


def _read(name: str, word: str, kind: type) -> Any:
    if kind is bool:
        if word.lower() not in ("yes", "no", "true", "false"):
            raise UsageError("a yes or a no is wanted", where=f"--advise {name}", value=word)
        return word.lower() in ("yes", "true")
    try:
        found = kind(word.replace("_", "").replace(",", ""))
    except ValueError:
        found = -1
    if not 0 <= found < float("inf"):
        raise UsageError("a number is wanted", where=f"--advise {name}", value=word)
    return found
