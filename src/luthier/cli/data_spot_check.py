"""`luthier data sample BUILT` and `luthier data verdicts BUILT check.csv`: people look at some rows of a built set.

The sample is the same whenever it is drawn again; the verdicts are read only for the set that it was drawn from.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

_BY = "origin,language,judge"


@click.command("sample")
@click.argument("built", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The sheet as CSV, for a spreadsheet.")
@click.option("--html", "page", type=click.Path(path_type=Path), help="The sheet as a page, for a browser.")
@click.option("--share", default=0.1, show_default=True, help="Share of the rows; 0.1 to 0.2 is the custom.")
@click.option("--rows", type=int, help="So many rows instead.")
@click.option("--by", default=_BY, show_default=True, help="Strata: origin, kind, file, or notes of steps.")
@click.option("--seed", default=0, show_default=True, help="Another seed is another sample.")
@click.option("--excel", is_flag=True, help="Begin the CSV with the mark by which Excel knows UTF-8.")
def sample(
    built: Path, out: Path | None, page: Path | None, share: float, rows: int | None, by: str, seed: int, excel: bool
) -> None:
    """Draw rows for people to judge: good, bad or unsure, or 1 to 5, with a comment.

    Every stratum has its share of the rows. The sheet is in random order, so that its beginning is a sample too.
    """
    from luthier.contracts.errors import UsageError
    from luthier.data import check_sheet
    from luthier.data.built_set import built_rows, rows_file
    from luthier.data.spot_check import SamplePlan, picked

    if out is None and page is None:
        raise UsageError("nowhere to write the sheet", remedy="give --out check.csv or --html check.html, or both")
    plan = SamplePlan(share=share, rows=rows, by=_names(by), seed=seed)
    rows_file(built)
    chosen, strata = picked(partial(built_rows, built), plan)
    if out is not None:
        _write(out, ("\ufeff" if excel else "") + check_sheet.sheet(chosen))
    if page is not None:
        _write(page, check_sheet.page(chosen, f"Spot-check of {built.name or built}"))
    where = " and ".join(str(path) for path in (out, page) if path)
    click.echo(f"{len(chosen):,} of {strata.total:,} rows, {len(strata.rows)} strata by {', '.join(plan.by)}: {where}")


@click.command("verdicts")
@click.argument("built", type=click.Path(path_type=Path))
@click.argument("sheet", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--by", default=_BY, show_default=True, help="Strata of the table and of the weights.")
@click.option("--accept", type=click.FloatRange(0, 1), help="Exit 3 where the share of good rows is below, as 0.95.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def verdicts(built: Path, sheet: Path, by: str, accept: float | None, as_json: bool) -> None:
    """What the verdicts on a sample say of the whole set: the share of good rows, with its interval."""
    from luthier.contracts.errors import DataError
    from luthier.data.built_set import built_rows
    from luthier.data.check_sheet import judged

    made = judged(built_rows(built), _names(by), sheet).to_json()
    if as_json:
        click.echo(json.dumps(made, ensure_ascii=False))
    else:
        _tell(made)
    if accept is not None and (made["share"] is None or made["share"] < accept):
        remedy = f"{accept:g} was asked for: clean the strata with the lowest shares and build again"
        raise DataError("too few rows are good", where=str(sheet), value=made["share"], remedy=remedy)


def _names(by: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in by.split(",") if name.strip()))


def _write(path: Path, text: str) -> None:
    from luthier.disk.durable import replace_text

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def _tell(made: dict[str, Any]) -> None:
    click.echo(
        f"{made['judged']} of {made['rows']:,} rows judged: {made['good']} good, {made['bad']} bad"
        f"; {made['unsure']} unsure, {made['not_judged']} of the sheet without a verdict"
    )
    if made["share"] is None:
        return
    click.echo(f"good: {_share(made)} of the set, each stratum counted by its rows")
    low, high = made["interval_finite"]
    click.echo(f"  of exactly these {made['rows']:,} rows (finite population): {low:.1%} to {high:.1%}")
    if made["unsure"]:
        click.echo(f"  if every unsure row is bad: {made['if_unsure_is_bad']:.1%}")
    if made["rows_of_strata_without_verdicts"]:
        click.echo(f"  nothing is said of {made['rows_of_strata_without_verdicts']:,} rows in strata without a verdict")
    if beside := made.get("judge"):
        kappa = "not defined" if beside["kappa"] is None else f"{beside['kappa']:.2f}"
        click.echo(f"  judge and people agree on {beside['agreed']} of {beside['rows']} rows, Cohen's kappa {kappa}")
    for one in made["strata"]:
        name = ", ".join(f"{key} {value}" for key, value in one["stratum"].items() if value != "-") or "all"
        said = _share(one) if "share" in one else "no verdict"
        click.echo(f"  {name}: {one['rows']:,} rows, {one['good']} good, {one['bad']} bad: {said}")


def _share(made: dict[str, Any]) -> str:
    low, high = made["interval"]
    return f"{made['share']:.1%} (95 %: {low:.1%} to {high:.1%})"
