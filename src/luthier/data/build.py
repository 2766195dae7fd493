"""From raw files to a clean set on disk: the sources read, the steps in their order, one file of rows, and an account.

    OUT/train.jsonl     the rows, in the field's own forms (built.py)     OUT/ledger.json   what became of every row
    OUT/manifest.json   what it was made of and by, and the digest of     OUT/rejects.jsonl wrong rows, where they were
                        the rows; written last                                              quarantined
    OUT/README.md       the card of the set (card.py)                     OUT/stats.json    its figures, quality too
    OUT/.work/          stages under way (gone at the end), caches of steps (kept: answers of an endpoint cost money)

The build is a list of passes (passes.py); whoever runs them (processes here, tasks of a cluster) gets the same bytes.
Its key digests the contents of all files read, the fields of sources and steps, the seed and our own code, so a built
set is taken again only where nothing of it would come out another way, and a stage of an interrupted build likewise.
`weight` of a source counts at the end, after duplicates are gone: 2.3 puts every row twice, and a third time where
the hash of (seed, the row) says so.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from luthier.contracts.errors import UsageError
from luthier.contracts.step import Room, RowStep, SetStep, Step
from luthier.data.applied import name_of
from luthier.data.crew import Crew, Progress, cores
from luthier.data.finish import CountPass, FinishPass
from luthier.data.own_code import code
from luthier.data.passes import ApplyPass, DecidePass, Pass, Read, RowPass, SketchPass
from luthier.data.paths import expand, is_hub_id
from luthier.data.sources import resolved
from luthier.data.stage import Stage
from luthier.disk.lock import hold
from luthier.recipe.recipe import DataSource

_BYTES_PER_WORKER = 8 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class BuildSpec:
    """What decides the rows of a build."""

    sources: tuple[DataSource, ...]
    steps: tuple[Step, ...]
    seed: int = 0
    bad_rows: str = "strict"
    evaluation: tuple[str, ...] = ()  # the files of data.eval
    tokenizer: Callable[[], Any] | None = field(default=None, compare=False)
    tokenizer_digest: str = ""  # of what it opens
    scorer: Callable[[str], Any] | None = field(default=None, compare=False)  # opens a reward model


@dataclass(frozen=True)
class Built:
    """A built set: its directory, and what its manifest and ledger say."""

    directory: Path
    manifest: Mapping[str, Any]
    ledger: Mapping[str, Any]
    reused: bool = False

    @property
    def rows(self) -> Path:
        return self.directory / "train.jsonl"


class Runner(AbstractContextManager["Runner"], Protocol):
    """Who works through the passes: processes of ours (crew.py), tasks of a cluster (scale.py)."""

    def run(self, work: Pass, progress: Progress) -> None: ...


def build(
    spec: BuildSpec, out: Path, workers: int | None = None, progress: Progress | None = None,
    runner: Runner | None = None,
) -> Built:  # fmt: skip
    """The built set in `out`: made, gone on with, or taken as it is where it is this very one."""
    work = building(spec, out, workers, progress, runner)
    while True:
        try:
            next(work)
        except StopIteration as end:
            built: Built = end.value
            return built


def building(
    spec: BuildSpec, out: Path, workers: int | None = None, progress: Progress | None = None,
    runner: Runner | None = None,
) -> Generator[str, None, Built]:  # fmt: skip
    """`build`, saying which pass comes next."""
    with hold(out):
        passes = plan(spec, out)
        finish = passes[-1]
        assert isinstance(finish, FinishPass)
        if reused := finish.complete():
            return Built(out, finish.manifest(), finish.ledger(), reused)
        sweep(out, passes)
        with runner or Crew(workers or _workers(spec)) as crew:
            for work in passes:
                yield work.title
                here = isinstance(crew, Crew)  # the decision of a set step is made in this process
                crew.run(_heard(work, progress or _quiet) if here else work, progress or _quiet)
        shutil.rmtree(out / ".work" / "stages", ignore_errors=True)
        return Built(out, finish.manifest(), finish.ledger())


def plan(spec: BuildSpec, out: Path, digest: Callable[[str], str] | None = None) -> list[Pass]:
    """The passes of a build in their order; the last is the FinishPass. Nothing is written."""
    digest = digest or file_digest
    _refuse_foreign(out)
    files = tuple(
        (path, source, source.name or origin_of(source.path))
        for source in resolved(spec.sources)[0]
        for path in expand(source.path, source.split)
    )
    room = Room(out / ".work" / "cache", spec.seed, spec.evaluation, spec.tokenizer, scorer=spec.scorer)
    inputs = [{"file": path, "sha256": digest(path)} for path, _, _ in files]
    said = [
        {**one, "source": source.model_dump(), "origin": o} for one, (_, source, o) in zip(inputs, files, strict=True)
    ]
    key = _key("", "read", said, spec.bad_rows, spec.seed, code())
    passes: list[Pass] = [Read(_stage(out, 0, "read", key), room, files, spec.bad_rows)]
    for number, group in enumerate(_groups(spec.steps), start=1):
        key = _key(key, *(_said(step, spec, digest) for step in group))
        name = name_of(group[0]) + (f"-and-{len(group) - 1}" if len(group) > 1 else "")
        passes += _passes(_stage(out, number, name, key), room, passes[-1], group)
    weights = tuple(sorted({origin: source.weight for _, source, origin in files}.items()))
    rows, counts = passes[-1], _stage(out, len(passes), "quality", _key(key, "quality", weights))
    counted = CountPass(counts, room, rows, weights)
    about = {
        "key": _key(key, "finish"), "luthier": version("luthier"), "code": code(), "seed": spec.seed,
        "bad_rows": spec.bad_rows, "inputs": inputs, "sources": [source.model_dump() for source in spec.sources],
        "steps": [_said(step, spec, digest) for step in spec.steps],
    }  # fmt: skip
    return [*passes, counted, FinishPass(Stage(out), room, rows, tuple(passes), weights, counted, about)]


def sweep(out: Path, passes: Sequence[Pass]) -> None:
    """Take away stages that no pass of this build uses, and what a killed writer left half done."""
    used = {work.stage.directory for work in passes}
    stages = out / ".work" / "stages"
    for directory in sorted(stages.iterdir()) if stages.is_dir() else []:
        if directory not in used:
            shutil.rmtree(directory)
            continue
        for left in directory.glob("*.new"):
            left.unlink()


def origin_of(path: str) -> str:
    """What a source is called that has no name: the file's or folder's name up to its first dot."""
    return Path(path.rstrip("/")).name.split(".")[0] or path


def file_digest(path: str) -> str:
    """sha256 of a file's bytes, of a directory's files and their names; a hub id stands for itself."""
    if is_hub_id(path):
        return hashlib.sha256(path.encode()).hexdigest()
    place = Path(path)
    if place.is_dir():
        state = hashlib.sha256()
        for file in sorted(one for one in place.rglob("*") if one.is_file()):
            state.update(f"{file.relative_to(place)}\0{file_digest(str(file))}\0".encode())
        return state.hexdigest()
    with place.open("rb") as file_:
        return hashlib.file_digest(file_, "sha256").hexdigest()


def _heard(work: Pass, progress: Progress) -> Pass:
    """A decision can take long, and says by itself how far it is. It never leaves this process."""
    if not isinstance(work, DecidePass):
        return work
    return replace(work, room=replace(work.room, progress=lambda what, done, of: progress(what, done, of, "rows")))


def _groups(steps: Sequence[Step]) -> list[list[Step]]:
    """Row steps after one another that may run in one pass; every set step by itself."""
    made: list[list[Step]] = []
    for step in steps:
        with_last = made and isinstance(step, RowStep) and isinstance(made[-1][-1], RowStep)
        if with_last and made[-1][-1].one_process == step.one_process:
            made[-1].append(step)
        else:
            made.append([step])
    return made


def _passes(stage: Stage, room: Room, previous: Pass, group: Sequence[Step]) -> list[Pass]:
    first = group[0]
    if not isinstance(first, SetStep):
        return [RowPass(stage, room, previous, tuple(step for step in group if isinstance(step, RowStep)))]
    decision = Stage(stage.directory.with_name(stage.directory.name + "-decision"))
    return [
        SketchPass(decision, room, previous, first), DecidePass(decision, room, previous, first),
        ApplyPass(stage, room, previous, first, decision),
    ]  # fmt: skip


def _stage(out: Path, number: int, name: str, key: str) -> Stage:
    return Stage(out / ".work" / "stages" / f"{number:02d}-{name}-{key[:16]}")


def _said(step: Step, spec: BuildSpec, digest: Callable[[str], str]) -> dict[str, Any]:
    """A step's name, fields, and the digests of the files it names."""
    files = {path: digest(found) for path in step.files() for found in expand_any(path)}
    more = {"evaluation": {path: digest(path) for path in spec.evaluation}} if spec.evaluation else {}
    return {"name": name_of(step), **asdict(step), **({"files": files} if files else {}), **more,  # type: ignore[call-overload]
            **({"tokenizer": spec.tokenizer_digest} if spec.tokenizer_digest else {})}  # fmt: skip


@dataclass
class Digests:
    """`file_digest` that remembers: tasks of a cluster do not each read all files, but see that none has changed."""

    known: dict[str, tuple[int, int, str]] = field(default_factory=dict)  # path -> bytes, time of change, sha256

    def __call__(self, path: str) -> str:
        place = Path(path)
        if not place.is_file():
            return file_digest(path)
        size, changed = place.stat().st_size, place.stat().st_mtime_ns
        seen = self.known.get(path)
        if seen is None or seen[:2] != (size, changed):
            seen = self.known[path] = (size, changed, file_digest(path))
        return seen[2]

    def to_json(self) -> dict[str, Any]:
        return {path: list(seen) for path, seen in self.known.items()}

    @classmethod
    def from_json(cls, made: Mapping[str, Any]) -> Digests:
        return cls({path: (size, changed, sha256) for path, (size, changed, sha256) in made.items()})


def expand_any(path: str) -> list[str]:
    """The files behind a path that a step names: data files, a directory of a model, anything that exists."""
    return [path] if Path(path).exists() else expand(path)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _workers(spec: BuildSpec) -> int:
    paths = [Path(path) for source in resolved(spec.sources)[0] for path in expand(source.path, source.split)]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    return max(1, min(cores(), size // _BYTES_PER_WORKER))


def _refuse_foreign(out: Path) -> None:
    """A directory that holds something else is never written into."""
    if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").exists() and not (out / ".work").is_dir():
        others = sorted(path.name for path in out.iterdir() if path.name != ".lock")
        if others:
            raise UsageError("the directory holds something that is no built set", where=str(out), value=others[0],
                             remedy="choose another --out, or empty it")  # fmt: skip


def _quiet(title: str, done: int, total: int, measure: str) -> None:
    return None
