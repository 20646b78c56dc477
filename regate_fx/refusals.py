"""What an error of Dynamo's says about a model, as a refusal."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._dynamo.exc import InternalTorchDynamoError, UserError
from torch._dynamo.exc import Unsupported as DynamoUnsupported
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

from regate_fx.dynamo_settings import TRACE_LIMIT
from regate_fx.errors import LayerRefusal, NotGateable, RegateError, Unsupported

# What Dynamo raises when the capture needs a size to be a constant that was declared to vary.
_STATIC_SIZES = (UserError, ConstraintViolationError)
# The same, and what it raises where one graph was asked for and the code, or an error of its own, does not allow it.
NOT_WHOLE = (*_STATIC_SIZES, DynamoUnsupported, GuardOnDataDependentSymNode, InternalTorchDynamoError)
# Says nothing about the model.
_OF_THE_MACHINE = (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


def too_many_traces() -> Unsupported:
    return Unsupported(
        f"a gated model with more than {TRACE_LIMIT} traces",
        "something beside batch size and sequence length changes from call to call.",
        "TORCH_LOGS=recompiles names it.",
    )


def of_backend(backend: object, error: Exception) -> Exception:
    """What is to be raised where a backend raised an error as it compiled a graph."""
    if isinstance(error, (RegateError, *_OF_THE_MACHINE, *NOT_WHOLE)):
        return error
    name = repr(backend) if isinstance(backend, str) else "the backend"
    first = str(error).strip().partition("\n")[0]
    reason = (
        f"{name} fails to compile the graph ({type(error).__name__}: {first}); see whether it compiles the model "
        "without regate_fx, or name another backend: 'aot_eager' generates no code"
    )
    return NotGateable([LayerRefusal(None, "backend", reason)])


def of_a_backend(error: NotGateable) -> bool:
    return any(refusal.code == "backend" for refusal in error.refusals)


def as_refusal(error: Exception) -> Exception:
    if isinstance(error, NotGateable):
        return error
    first = str(error).partition("\n")[0]
    # Dynamo makes of it the same error as of a constant size.
    if any(isinstance(origin, GuardOnDataDependentSymNode) for origin in _origins(error)):
        reason = f"the model decides by a number that it reads from a tensor ({first})"
        return NotGateable([LayerRefusal(None, "number", reason)])
    if isinstance(error, _STATIC_SIZES):
        reason = f"the model makes a constant of the batch size or the sequence length ({first})"
        return NotGateable([LayerRefusal(None, "static-size", reason)])
    return NotGateable([LayerRefusal(None, "graph-break", f"the model cannot be captured whole ({first})")])


def _origins(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def finds_nothing(error: Exception) -> bool:
    nothing = {"no-attention", "no-graph", "no-capture"}
    return isinstance(error, NotGateable) and {refusal.code for refusal in error.refusals} <= nothing
