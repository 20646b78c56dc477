"""The `regate-fx` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

# What both commands say of the data, so that one is told of them as the other was.
_COLLATOR = (
    "module:function that makes a batch of a list of examples; if it takes a second argument, the processor. By "
    "default examples hold a text, or input_ids and perhaps labels."
)
_MAX_LENGTH = "Truncate texts to so many tokens; without a collator of your own."
_SPLIT = "Split of the data set."
_NUMBER = "Number samples in their order, in place of a sample_id."

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def regate_fx() -> None:
    """Train Hugging Face language models on the tokens that teach."""


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="Hub name, folder or config.json; weights are not loaded.")],
    seq: Annotated[int, typer.Option(min=2, help="Positions of a sample.")] = 4096,
    batch: Annotated[int, typer.Option(min=2, help="Samples of a batch.")] = 2,
    keep: Annotated[float, typer.Option(help="Share of the labelled tokens that is kept.")] = 0.5,
    output_share: Annotated[
        float | None,
        typer.Option(help="Labelled tokens among all.  [default: all, as in training on plain text]"),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code from the hub.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """Tell which layers of a model can be gated, why not the others, and the FLOPs that would save.

    A vision-language model is seen with text alone. The exit code is 1 where nothing can be gated.
    """
    from regate_fx import explain_command

    explain_command.run(
        explain_command.Request(model, seq, batch, keep, output_share, trust_remote_code), as_json=as_json
    )


@app.command()
def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(help="A store's folder, a gate's checkpoint or the folder it is in, or both."),
    ],
    data: Annotated[
        str | None,
        typer.Option(help="A data set saved to disk, a json, jsonl, csv or parquet file, or a hub name."),
    ] = None,
    processor: Annotated[
        str | None,
        typer.Option(
            "--processor",
            "--tokenizer",
            help="Folder or hub name of the processor or tokenizer, which shows tokens as text.",
        ),
    ] = None,
    collator: Annotated[str | None, typer.Option(help=_COLLATOR)] = None,
    max_length: Annotated[int | None, typer.Option(help=_MAX_LENGTH)] = None,
    split: Annotated[str, typer.Option(help=_SPLIT)] = "train",
    number: Annotated[bool, typer.Option("--number", help=_NUMBER)] = False,
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
            processor=processor,
            collator=collator,
            max_length=max_length,
            split=split,
            number=number,
            samples=tuple(sample or ()),
            keep=keep,
            policy=policy,
            top=top,
            limit=limit,
            html=html,
        )
    )


@app.command()
def teacher(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the model that will be trained.")],
    data: Annotated[
        str,
        typer.Argument(help="A data set saved to disk, a json, jsonl, csv or parquet file, or a hub name."),
    ],
    folder: Annotated[Path, typer.Argument(help="Where the losses are kept; the same for all processes.")],
    processor: Annotated[
        str | None, typer.Option(help="Folder or hub name of the processor or tokenizer.  [default: MODEL]")
    ] = None,
    collator: Annotated[str | None, typer.Option(help=_COLLATOR)] = None,
    max_length: Annotated[int | None, typer.Option(help=_MAX_LENGTH)] = None,
    split: Annotated[str, typer.Option(help=_SPLIT)] = "train",
    streaming: Annotated[bool, typer.Option("--streaming", help="Read the data set as a stream.")] = False,
    number: Annotated[bool, typer.Option("--number", help=_NUMBER)] = False,
    teacher_model: Annotated[
        str | None, typer.Option("--teacher", help="Another text model as teacher, of the same tokenizer.")
    ] = None,
    placeholder_id: Annotated[
        int | None,
        typer.Option(
            help="Token that the teacher reads where pictures are.  [default: padding, else end of sequence]"
        ),
    ] = None,
    visual_id: Annotated[
        list[int] | None,
        typer.Option(
            help="Token that stands for pictures; more than once for several.  [default: the config's]"
        ),
    ] = None,
    special_id: Annotated[
        list[int] | None,
        typer.Option(
            help="Label that always counts in training; more than once for several.  [default: the tokenizer's]"
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="In which the models are loaded and run; auto: as they were saved."),
    ] = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Most samples of a batch.  [default: 8]")] = None,
    max_tokens_per_batch: Annotated[
        int | None, typer.Option(help="Most positions of a batch, padding included.")
    ] = None,
    samples_per_shard: Annotated[
        int | None,
        typer.Option(
            help="Samples that a process takes at once, and loses at most when it is killed.  "
            "[default: 1/256 of the data, 500 to 20,000; 5,000 of a stream]"
        ),
    ] = None,
    losses_dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="How losses are stored; float16 is off by at most 1 in 2048."),
    ] = "float32",
) -> None:
    """Compute the teacher's loss on every label of a data set, once, before training.

    Started again, it goes on where it was stopped. With `accelerate launch -m regate_fx.cli teacher ...` the processes
    share the work.
    """
    from regate_fx import teacher_command

    teacher_command.run(
        teacher_command.Request(
            model=model,
            data=data,
            folder=folder,
            processor=processor,
            collator=collator,
            max_length=max_length,
            split=split,
            streaming=streaming,
            number=number,
            teacher=teacher_model,
            dtype=dtype,
        ),
        batch_size=batch_size,
        max_tokens_per_batch=max_tokens_per_batch,
        samples_per_shard=samples_per_shard,
        losses_dtype=losses_dtype,
        placeholder_id=placeholder_id,
        visual_ids=visual_id or None,
        special_ids=special_id or None,
    )


if __name__ == "__main__":
    app()
