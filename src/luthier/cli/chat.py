"""`luthier chat TARGET [TARGET …]`: a conversation at the terminal, with one target or several side by side.

The history grows turn by turn under the same template as in training; nothing is stored.
"""

from __future__ import annotations

import click

from luthier.contracts.errors import UsageError


@click.command("chat")
@click.argument("targets", nargs=-1, required=True, type=click.Path())
@click.option("--system", help="System message at the start.")
@click.option("--base", type=click.Path(), help="Base model, where the adapter's own reference is not at hand.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0.0), help="0 is greedy.")
def command(
    targets: tuple[str, ...], system: str | None, base: str | None, max_new_tokens: int, temperature: float
) -> None:  # fmt: skip
    """Talk to runs, adapters or models. An empty line or end of input ends it; /reset starts over."""
    from luthier import run

    talkers = [run.load(target, base=base) for target in targets]
    for name, talker in zip(targets, talkers, strict=True):
        talker.refuse_reward_model()
        if talker.encoder.template is None:
            raise UsageError("the target has no chat template", where=name, remedy="use `luthier generate --raw`")
    opening = [{"role": "system", "content": system}] if system else []
    histories: list[list[dict[str, str]]] = [list(opening) for _ in talkers]
    while True:
        try:
            said = click.prompt("you", prompt_suffix="> ", default="", show_default=False)
        except (EOFError, click.Abort):
            click.echo()
            return
        if not said.strip():
            return
        if said.strip() == "/reset":
            histories = [list(opening) for _ in talkers]
            continue
        for name, talker, history in zip(targets, talkers, histories, strict=True):
            history.append({"role": "user", "content": said})
            click.echo(click.style(f"{name if len(targets) > 1 else 'model'}> ", bold=True), nl=False)
            parts = []
            for part in run.reply(talker, history, max_new_tokens=max_new_tokens, temperature=temperature):
                parts.append(part)
                click.echo(part, nl=False)
            click.echo()
            history.append({"role": "assistant", "content": "".join(parts)})
