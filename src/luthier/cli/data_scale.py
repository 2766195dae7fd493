"""`luthier data build --on datatrove|slurm|ray`: where the passes of a build run, as options and as what is printed.

The rows are the same bytes wherever it runs; these options choose machines, not rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from luthier.data.build import Built
    from luthier.recipe.recipe import Recipe

_OPTIONS = (
    click.option("--on", default="local", type=click.Choice(["local", "datatrove", "slurm", "ray"]), show_default=True,
                 help="Who runs the passes; all but local need the extra `scale`."),
    click.option("--tasks", type=click.IntRange(min=1), help="Tasks of a pass on datatrove, Slurm or Ray; default: 2."),
    click.option("--dry-run", is_flag=True, help="Say the passes (slurm: write the scripts), run nothing."),
    click.option("--task-cpus", default=1, show_default=True, type=click.IntRange(min=1), help="Slurm, Ray."),
    click.option("--task-memory", default=2, show_default=True, type=click.IntRange(min=1), help="GB a CPU, likewise."),
    click.option("--slurm-partition", default="", help="Slurm: the partition."),
    click.option("--slurm-time", default="04:00:00", show_default=True, help="Slurm: limit of one task."),
    click.option("--slurm-setup", default="", help="Slurm: shell before each task: source env/bin/activate"),
    click.option("--slurm-arg", multiple=True, metavar="KEY=VALUE", help="Slurm: more for sbatch, such as account=me."),
    click.option("--pass", "number", type=int, hidden=True, help="Inside a Slurm task: the pass that it is of."),
)  # fmt: skip
_STAYS = ("on", "tasks", "task_cpus", "task_memory", "slurm_partition", "slurm_time")


def cluster_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options above, in their order."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def build_elsewhere(
    recipe: Recipe, out: str | None, where: dict[str, Any], words: Sequence[str], show: Any
) -> Built | None:
    """What `--on` and `--dry-run` ask for; None where no set is there when this ends. `words`: recipe and overrides."""
    from luthier.building import place_of, spec_of
    from luthier.data.build import build, plan

    spec, place = spec_of(recipe), Path(out) if out else place_of(recipe)
    if where["dry_run"] and where["on"] != "slurm":
        for number, work in enumerate(plan(spec, place)):
            click.echo(f"{number:02d} {work.title}" + (" (one task)" if work.serial else ""))
        return None
    scale = _room("scale")
    cluster = scale.Cluster(
        on=where["on"], tasks=where["tasks"] or 2, cpus_per_task=where["task_cpus"],
        memory_gb_per_cpu=where["task_memory"], partition=where["slurm_partition"], time=where["slurm_time"],
        setup=where["slurm_setup"], arguments=where["slurm_arg"],
    )  # fmt: skip
    if where["on"] != "slurm":
        return build(spec, place, None, show, scale.crew_of(cluster, place))
    slurm = _room("slurm")
    if where["number"] is not None:
        slurm.run_pass(spec, place, cluster, where["number"])
        return None
    command = [*slurm.program(), *_command(words, out, where)]
    return _told(slurm.launch(spec, place, cluster, command, dry_run=where["dry_run"]))


def _told(launched: Any) -> Built | None:
    if launched.built is None:
        for script in launched.scripts:
            click.echo(str(script))
        done = f"submitted as {', '.join(launched.jobs)}" if launched.jobs else "not submitted (dry run)"
        click.echo(f"{len(launched.scripts)} jobs, each after the one before: {done}")
    built: Built | None = launched.built
    return built


def _room(name: str) -> Any:
    """data.scale or data.slurm, or the error that says what to install."""
    from luthier.contracts.errors import UsageError

    try:
        return import_module(f"luthier.data.{name}")
    except ImportError as error:
        if (error.name or "").startswith("luthier"):
            raise
        raise UsageError("datatrove is not installed", where="--on", remedy="pip install 'luthier[scale]'") from error


def _command(words: Sequence[str], out: str | None, where: dict[str, Any]) -> list[str]:
    """The command line of a task, but for its pass."""
    said = ["data", "build", *words, *(["--out", out] if out else [])]
    for name in _STAYS:
        if where[name]:
            said += [f"--{name.replace('_', '-')}", str(where[name])]
    return said
