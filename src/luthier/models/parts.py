"""The parameters of a base by where they lie, for methods that train a part of it: `parts_of`, `matching`, `let_train`.

    embedding   what turns ids into rows, positions included; a tied head lies here
    layers      one entry for each decoder layer, bottom first
    after       registered after the layers and no head: the final norm
    head        an untied language head, or a reward model's score head
    rest        registered before the layers and no embedding (an embedding's norm, a projection)

Names are the model's own, a tied tensor once. Patterns are read as Axolotl reads `unfrozen_parameters`: a regular
expression from the start of the name, in which a dot is a dot unless a repetition follows it (`.*`), so that
`model.layers.1.` is not layer 10. Left out: Axolotl's ranges of rows at the end of a pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import SCHEDULED
from luthier.models.shapes import decoder_layers, output_head

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Parts:
    """Names of parameters."""

    embedding: frozenset[str]
    layers: tuple[frozenset[str], ...]
    after: frozenset[str]
    head: frozenset[str]
    rest: frozenset[str]

    @property
    def outside(self) -> frozenset[str]:
        """All that is in no layer."""
        return self.embedding | self.after | self.head | self.rest


def parts_of(model: nn.Module) -> Parts:
    """Every parameter in exactly one part; RecipeError where the model has no list of layers."""
    pattern, paths = decoder_layers(model)
    if not paths:
        raise RecipeError("this model has no list of layers", where="method", remedy="use method: full, or lora")
    places = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    inside: list[set[str]] = [set() for _ in paths]
    for name in places:
        if name.startswith(f"{pattern}."):
            inside[int(name[len(str(pattern)) + 1 :].partition(".")[0])].add(name)
    taken = set().union(*inside)
    embedding = _names_of(model, [m for m in model.modules() if isinstance(m, nn.Embedding)]) - taken
    head = _names_of(model, [output_head(model)]) - taken - embedding
    left = places.keys() - taken - embedding - head
    last = max((places[name] for name in taken), default=len(places))
    after = frozenset(name for name in left if places[name] > last)
    layers = tuple(frozenset(names) for names in inside)
    return Parts(embedding, layers, after, head, frozenset(left) - after)


def matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Those that one of the patterns matches."""
    compiled = [re.compile(as_regex(pattern)) for pattern in patterns]
    return {name for name in names if any(regex.match(name) for regex in compiled)}


def as_regex(pattern: str) -> str:
    """A pattern with its plain dots escaped."""
    return re.sub(r"(?<!\\)\.(?![*+?{])", r"\\.", pattern)


def check_patterns(patterns: Sequence[str], where: str) -> None:
    """RecipeError for what is no regular expression, or asks for rows of a tensor."""
    for pattern in patterns:
        if re.search(r"\[\d*:\d*\]$", pattern):
            raise RecipeError("a range of rows is not supported: whole tensors train or rest", where=where,
                              value=pattern, remedy="leave the range out")  # fmt: skip
        try:
            re.compile(as_regex(pattern))
        except re.error as error:
            raise RecipeError(f"not a regular expression: {error}", where=where, value=pattern,
                              remedy="a pattern on the names of parameters, from their start") from None  # fmt: skip


def check_matches(model: nn.Module, patterns: Sequence[str], where: str) -> None:
    """RecipeError for a pattern that names nothing in this model."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not matching(names, [pattern]):
            shown = ", ".join([*names[:_SHOWN], names[-1]])
            raise RecipeError(
                "no parameter of this model matches", where=where, value=pattern,
                remedy=f"a pattern starts where a name starts; its parameters are called: {shown}",
            )  # fmt: skip


def let_train(model: nn.Module, now: Iterable[str], ever: Iterable[str] | None = None) -> None:
    """Exactly `now` trains; what is in `ever` too, at another step of a schedule (contracts/method.py `trains`)."""
    now = set(now)
    scheduled = None if ever is None else set(ever)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in now)
        if scheduled is not None:
            setattr(parameter, SCHEDULED, name in scheduled)


def _names_of(model: nn.Module, modules: Sequence[nn.Module | None]) -> frozenset[str]:
    own = {id(p) for module in modules if module is not None for p in module.parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in own)
