"""Dynamo's settings while a gated call is captured."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from regate_fx import ops

# Sizes of one (B, S, N or L) are specialised by Dynamo, as are train and eval mode and autocast.
TRACE_LIMIT = 64


@contextlib.contextmanager
def capture_settings(whole: bool) -> Iterator[None]:
    """Dynamo settings for our own capture, restored afterwards.

    In a model that is several graphs, what passes from one to the next has symbolic sizes too. Each is a symbol of its
    own: as many image features as positions must not be taken for positions. In a single graph, numbers read from
    tensors are captured too; vision-language models compare that of image positions with that of image features.
    """
    # Entered in every call: `config.patch` makes a class each time, and writes what has its value already.
    before: list[tuple[Any, str, Any]] = []
    try:
        for config, name, value in _settings(whole):
            if (found := getattr(config, name)) != value:
                before.append((config, name, found))
                setattr(config, name, value)
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


@cache
def _settings(whole: bool) -> tuple[tuple[Any, str, Any], ...]:
    dynamo = {
        "assume_static_by_default": whole,
        "capture_scalar_outputs": whole,
        "capture_dynamic_output_shape_ops": whole,
        "specialize_int": not whole,
        "force_nn_module_property_static_shapes": whole,
        "optimize_ddp": False,
        "ignore_logging_functions": _logging_methods(),
        "recompile_limit": TRACE_LIMIT,
        # Past the limit Dynamo would run the model without the passes, and without a word.
        "fail_on_recompile_limit_hit": whole,
        "specialize_float": True,
    }
    if hasattr(torch._dynamo.config, "nested_graph_breaks"):
        # A layer that breaks is to be missing from the graph, not to be there by half.
        dynamo["nested_graph_breaks"] = False
    shapes = (torch.fx.experimental._config, "use_duck_shape", False)
    return (*((torch._dynamo.config, name, value) for name, value in dynamo.items()), shapes)


@contextlib.contextmanager
def compile_settings() -> Iterator[None]:
    """Settings for compiling a graph with our operators.

    The compile caches on disk know an operator by its name alone: what they hold of another version of ours is stale.
    A backward is compiled with its forward: later, these settings would be gone, and an error of the backend's would
    come in the middle of a step.
    """
    tag = torch.compiler.config.cache_key_tag + _ops_tag()
    with (
        torch.compiler.config.patch(cache_key_tag=tag),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
    ):
        yield


@cache
def _ops_tag() -> str:
    """The version of our operators: a digest of their code."""
    return f"regate_fx-{digest(Path(ops.__file__).parent)}"


def digest(folder: Path) -> str:
    """Of the names and contents of a folder's modules."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _logging_methods() -> set[Callable[..., Any]]:
    """A warning of the model's must not break the graph between its layers and its loss."""
    names = ("debug", "info", "warning", "info_once", "warning_once", "warning_advice")
    return {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}
