"""What `regate-fx explain` does: build a model of a configuration without weights, and explain it.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import typer
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from regate_fx.errors import InvalidInput, RegateError
from regate_fx.explain import explain
from regate_fx.inputs import own_signature
from regate_fx.report import Report


@dataclass(frozen=True)
class Request:
    """What to explain. Names are those of the command's arguments."""

    model: str
    seq: int = 4096
    batch: int = 2
    keep: float = 0.5
    output_share: float | None = None
    trust_remote_code: bool = False


def run(request: Request, *, as_json: bool) -> None:
    """Print the report, as a table or as JSON.

    Raises `typer.Exit` with code 1 where nothing can be gated, and where the model cannot be explained at all, for a
    reason that is printed.
    """
    messages = Console(stderr=True)
    try:
        with (
            messages.status("Building and capturing the model, without its weights"),
            warnings.catch_warnings(),
        ):
            # What Dynamo remarks on the model's code is for its authors.
            warnings.filterwarnings("ignore", module=r"torch\._dynamo")
            report = report_of(request)
    except RegateError as error:
        messages.print(f"[bold red]{type(error).__name__}[/] ", end="")
        messages.print(str(error), markup=False, highlight=False)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps({"model": request.model, **report.to_dict()}, indent=2))
    else:
        Console().print(report)
    if not report.gated:
        raise typer.Exit(1)


def report_of(request: Request) -> Report:
    """The report of text without padding. Raises `InvalidInput` where there is no model of that name."""
    with torch.device("meta"):
        model = _model(request)
        ids = torch.zeros(request.batch, request.seq, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in own_signature(model).parameters:
        inputs["decoder_input_ids"] = ids
    return explain(model, keep=request.keep, output_share=request.output_share, **inputs)


def _model(request: Request) -> nn.Module:
    trusted = {"trust_remote_code": request.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(request.model, **trusted)
        return _class_for(config).from_config(config, dtype=config.dtype or torch.bfloat16, **trusted)
    except Exception as error:  # whatever readers and checks of some hundred configurations raise
        raise InvalidInput(
            "model",
            f"{request.model!r} makes no causal or vision-language model: {error}",
            "Give a hub name, a model's folder or its config.json.",
        ) from error


def _class_for(config: PretrainedConfig) -> Any:
    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    own = getattr(config, "auto_map", None) or {}
    return (
        AutoModelForImageTextToText if sees or "AutoModelForImageTextToText" in own else AutoModelForCausalLM
    )
