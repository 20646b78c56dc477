"""What `regate-fx teacher` does: load what is named, and run the teacher pass on it."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import typer
from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    DataCollatorForSeq2Seq,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from regate_fx.errors import InvalidInput, RegateError
from regate_fx.runtime import teacher_losses

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


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


def load_processor(name: str) -> Any:
    """A processor, or the tokenizer of a model without one. Raises `InvalidInput` where there is neither."""
    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InvalidInput(
            "processor", f"cannot be loaded from {name!r} ({error}).", "Name its folder or hub name."
        ) from error


def load_data(name: str, split: str, *, streaming: bool, number: bool) -> Any:
    """A data set with a `sample_id`. Raises `InvalidInput` where it has none and `number` gives none."""
    data = _load_data(Path(name), name, split, streaming)
    columns = data.column_names
    if number:
        return data.map(_numbered, with_indices=True)
    if columns is not None and "sample_id" not in columns:
        raise InvalidInput(
            "sample_id",
            f"is no column of {name}, which has {sorted(columns)}.",
            "Give every sample its own integer, or number them with --number, here and in training alike.",
        )
    return data


def _load_data(path: Path, name: str, split: str, streaming: bool) -> Any:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = datasets.load_from_disk(name)
        data = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return data.to_iterable_dataset() if streaming else data
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise InvalidInput("data", f"{name} is none of {sorted(_FORMATS)}.", "Convert it.")
        return datasets.load_dataset(
            _FORMATS[path.suffix], data_files=name, split="train", streaming=streaming
        )
    return datasets.load_dataset(name, split=split, streaming=streaming)


def _numbered(example: Mapping[str, Any], index: int) -> dict[str, int]:
    return {"sample_id": index}


def load_collator(
    name: str | None, processor: Any, max_length: int | None
) -> Callable[[list[Any]], Mapping[str, Any]]:
    """The collator that `module:function` names, or one for plain text. Raises `InvalidInput`."""
    if name is None:
        return TextCollator(getattr(processor, "tokenizer", processor), max_length)
    module, _, function = name.partition(":")
    if max_length is not None:
        raise InvalidInput("max_length", f"is not passed on to {name}.", "Let the collator truncate.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Callable[..., Mapping[str, Any]] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInput(
            "collator", f"{name!r} cannot be found ({error}).", "Name it as module:function."
        ) from error
    finally:
        sys.path.pop(0)
    needed = [
        parameter
        for parameter in inspect.signature(found).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if len(needed) == 1:
        return found
    return functools.partial(_with_processor, found, processor)


def _with_processor(function: Callable[..., Any], processor: Any, examples: list[Any]) -> Mapping[str, Any]:
    collated: Mapping[str, Any] = function(examples, processor)
    return collated


class TextCollator:
    """Batches of a `text` or `input_ids`, every token a label, unless `labels` say which."""

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._pad = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, examples: list[Mapping[str, Any]]) -> Mapping[str, Any]:
        batch: Mapping[str, Any] = self._pad([self._tokenized(example) for example in examples])
        return batch

    def _tokenized(self, example: Mapping[str, Any]) -> dict[str, list[int]]:
        if "input_ids" in example:
            ids = list(example["input_ids"])[: self._max_length]
        elif "text" in example:
            cut = {"truncation": True, "max_length": self._max_length} if self._max_length else {}
            ids = self._tokenizer(example["text"], **cut)["input_ids"]
        else:
            raise InvalidInput(
                "collator",
                f"is needed for examples of {sorted(example)}.",
                "Name one as module:function, or give them a text or input_ids.",
            )
        labels = example.get("labels", ids)
        return {"input_ids": ids, "labels": list(labels)[: self._max_length]}
