"""The `regate-fx` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def regate_fx() -> None:
    """Train Hugging Face language models on the tokens that teach."""


@app.command()
def inspect(
    paths: Annotated[list[Path], typer.Argument(help="A store's folder, a gate's checkpoint, or both.")],
    data: Annotated[
        Path | None, typer.Option(help="The data set: a folder of save_to_disk, or json, jsonl, parquet.")
    ] = None,
    collator: Annotated[
        str | None, typer.Option(help="module:function that makes a batch of a list of examples.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub name of the tokenizer, which shows tokens as text.")
    ] = None,
    sample: Annotated[
        list[int] | None, typer.Option(help="Id of a sample to show; more than once for several.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the labels to keep; else the checkpoint's.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Policy to rank by, or module:object; else the checkpoint's.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the hardest and easiest to show.")] = 10,
    limit: Annotated[
        int, typer.Option(min=1, help="Samples of the data set whose tokens are averaged.")
    ] = 1000,
    html: Annotated[Path | None, typer.Option(help="Write the samples to this web page, too.")] = None,
) -> None:
    """Show what the teacher and the student find hard, and why tokens of a sample are kept or dropped."""
    from regate_fx.inspection import command

    command.run(
        command.Inspection(
            paths=paths,
            data=data,
            collator=collator,
            tokenizer=tokenizer,
            samples=tuple(sample or ()),
            keep=keep,
            policy=policy,
            top=top,
            limit=limit,
            html=html,
        )
    )


if __name__ == "__main__":
    app()
