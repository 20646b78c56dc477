"""Run a Dynamo graph once under functionalization and record what it does: functional ATen, writes become values.

`torch.export` and AOTAutograd record the same graph, after a first run that only collects what is written to. Here both
come out of one run, which is most of what normalisation costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch._aot_autograd.functional_utils import (
    from_fun,
    has_data_mutation,
    has_metadata_mutation,
    to_fun,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts

from regate_fx.passes.base import Refused
from regate_fx.passes.repeats import AliasWritten, RepeatingInterpreter


def functional_trace(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[int]]:
    """The graph over ATen operators, pre-dispatch, so that composite ones stay whole; sizes stay symbolic.

    inputs: fake values of the placeholders. Returns also the numbers of the placeholders that are written to: their
    new values come first among the outputs. Raises `Refused` where a shape or stride of an input is changed, or
    where the graph holds parameters or buffers: what is written to them would be lost.
    """
    if next(gm.parameters(), None) is not None or next(gm.buffers(), None) is not None:
        raise Refused("mutation", "the graph holds a parameter or buffer that is not a graph input")
    try:
        return _traced(gm, inputs, RepeatingInterpreter)
    except AliasWritten:
        return _traced(gm, inputs, PropagateUnbackedSymInts)


def _traced(
    gm: fx.GraphModule, inputs: Sequence[Any], interpreter: type[fx.Interpreter]
) -> tuple[fx.GraphModule, list[int]]:
    mutated: list[int] = []

    def functional(*arguments: Any) -> tuple[Any, ...]:
        with _no_functionalize_key():
            wrapped = pytree.tree_map(to_fun, arguments)
            outputs = interpreter(gm).run(*wrapped)
        tensors = [(i, value) for i, value in enumerate(wrapped) if isinstance(value, Tensor)]
        if any(
            has_metadata_mutation(value, arguments[i], check_only_storage_mutation=False)
            for i, value in tensors
        ):
            raise Refused("mutation", "the graph changes the shape or the strides of an input in place")
        mutated.extend(i for i, value in tensors if has_data_mutation(value))
        return (*(from_fun(wrapped[i]) for i in mutated), *pytree.tree_map(from_fun, tuple(outputs)))

    # Leaves of their own: what is recorded must not join the history of the captured values.
    leaves = [v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for v in inputs]
    with _recording(_fake_mode(inputs)):
        trace = make_fx(functional, decomposition_table={}, record_module_stack=True, pre_dispatch=True)
        recorded = trace(*leaves)
    recorded.graph.eliminate_dead_code()
    return recorded, mutated


def _fake_mode(inputs: Sequence[Any]) -> FakeTensorMode:
    """That of the captured values; the compiler that is called later has one of its own."""
    for value in inputs:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise Refused("no-inputs", "the captured graph has no tensor inputs")


@contextlib.contextmanager
def _recording(fake_mode: FakeTensorMode) -> Iterator[None]:
    with (
        # Else constants would get values of the other mode.
        torch._guards.tracing(torch._guards.TracingContext(fake_mode)),
        fake_mode,
        torch.fx.traceback.preserve_node_meta(),
        enable_python_dispatcher(),
        FunctionalTensorMode(pre_dispatch=True, export=True, _allow_token_discovery=True),
    ):
        yield


def _no_functionalize_key() -> Any:
    """The C++ key of the same name would wrap values a second time."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
