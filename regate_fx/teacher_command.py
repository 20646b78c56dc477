"""What `regate-fx teacher` does: load what is named, and run the teacher pass on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from regate_fx.errors import RegateError
from regate_fx.runtime import teacher_losses
from regate_fx.runtime.loading import load_collator, load_data, load_processor


@dataclass(frozen=True)
class Request:
    """What to load. Names are those of the command's arguments."""

    model: str
    data: str
    folder: Path
    processor: str | None = None
    collator: str | None = None
    max_length: int | None = None
    split: str = "train"
    streaming: bool = False
    number: bool = False
    teacher: str | None = None
    dtype: str = "auto"


def run(request: Request, **settings: Any) -> None:
    """Run the pass on this process's device and say what came of it; settings: see `teacher_losses`.

    Raises `typer.Exit` with code 1, its reason printed, where the pass is refused.
    """
    state = PartialState()
    console = Console(stderr=True)
    try:
        processor = load_processor(request.processor or request.model)
        own = request.teacher is not None
        losses = teacher_losses(
            load_model(request.model, request.dtype, state.device),
            load_data(request.data, request.split, streaming=request.streaming, number=request.number),
            request.folder,
            tokenizer=processor,
            collator=load_collator(request.collator, processor, request.max_length),
            teacher=load_model(str(request.teacher), request.dtype, state.device) if own else None,
            teacher_tokenizer=load_processor(str(request.teacher)) if own else None,
            settings={"collator": request.collator, "max_length": request.max_length},
            **settings,
        )
    except RegateError as error:
        console.print(f"[bold red]{type(error).__name__}[/] ", end="")
        console.print(str(error), markup=False, highlight=False)
        raise typer.Exit(1) from error
    if state.is_main_process:
        Console().print(
            f"{len(losses):,} samples, {losses.labels:,} labels. In training: "
            f"ReGate(ReferenceLosses.open({str(request.folder)!r}))",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    state.destroy_process_group()


def load_model(name: str, dtype: str, device: torch.device) -> nn.Module:
    """A causal or image-text model from a folder or the hub, in a dtype or as it was saved ("auto")."""
    kind = AutoConfig.from_pretrained(name).model_type
    pictures = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    loader = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
    model: nn.Module = loader.from_pretrained(name, dtype=dtype)
    return model.to(device)
