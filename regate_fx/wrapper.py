"""The gated model: to everything else it is the user's own.

`wrap` makes a second object of a class derived from the user's. Both objects share one `__dict__`, and
with it parameters, buffers, submodules, hooks, mode and config. The gated one adds its own `forward`; what
it has to remember lives in a slot, so that nothing of it reaches the user's object, a state dict or `to()`.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import nn

from regate_fx.errors import Bypassed, Unsupported
from regate_fx.gated_call import respond
from regate_fx.gating import Engine, Gate, Gating
from regate_fx.inputs import gated_signature, own_signature
from regate_fx.parallel import parallel_classes, refuse_tensor_parallel


class _Forward:
    """`forward` as a data descriptor.

    It wins over a `forward` in the shared `__dict__`, and what others assign to `gated.forward` (autocast,
    offload hooks) stays with the gated object: the user's own `forward` is called without meeting either. With a gate,
    what others assign has to call the gated forward in training.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __get__(self, gated: Gated | None, owner: type | None = None) -> Callable[..., Any]:
        if gated is None:
            return self._function
        gating = gated._regate
        if gating.override is None:
            return self._function.__get__(gated)
        return gating.override if gating.gate is None else types.MethodType(_heeding(gating.override), gated)

    def __set__(self, gated: Gated, value: Callable[..., Any]) -> None:
        gated._regate.override = value

    def __delete__(self, gated: Gated) -> None:
        if gated._regate.override is None:
            raise AttributeError("forward")
        gated._regate.override = None


def _heeding(override: Callable[..., Any]) -> Callable[..., Any]:
    """`override`, which others have put in the place of the gated forward, and which may have forgotten it."""

    @functools.wraps(override)
    def forward(self: Gated, *args: Any, **kwargs: Any) -> Any:
        gating = self._regate
        before = gating.entered
        output = override(*args, **kwargs)
        if self.training and gating.enabled and gating.entered == before:
            raise Bypassed("a training call was computed")
        return output

    return forward


class Gated(nn.Module):
    """What every gated model has besides the user's class; made by `wrap` only."""

    __slots__ = ("_regate",)
    _regate: Gating
    _own_class: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # `type(gated).from_pretrained(...)` builds the user's model, not a gated one without an engine.
        return cls._own_class(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        gating = self._regate
        chooses = gating.gate is not None and self.training
        if chooses or kwargs.get("token_mask") is not None or kwargs.get("sample_id") is not None:
            return _apart(super().__call__, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    @property
    def report(self) -> Any:
        """What happened to each layer; None before the first gated call."""
        return self._regate.engine.report

    @property
    def gating(self) -> bool:
        """Whether a token mask is obeyed. Settable at any time; off, every call runs the untouched model.

        Set it on this object: a container around it (DDP, PEFT) would keep an attribute of its own.
        """
        return self._regate.enabled

    @gating.setter
    def gating(self, enabled: bool) -> None:
        self._regate.enabled = bool(enabled)

    @property
    def gate(self) -> Any:
        """What chooses the positions in training, None where the caller does. Settable at any time, as `gating` is."""
        return self._regate.gate

    @gate.setter
    def gate(self, gate: Gate | None) -> None:
        self._regate.gate = gate
        if self._regate.base is not None:
            self._regate.base._regate.gate = gate

    def __copy__(self) -> Gated:
        original = copy.copy(self._regate.original)
        return _attach(object.__new__(type(self)), original, self._regate, self._regate.override)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gated:
        # Known to memo before its parts are copied: the shared __dict__ may hold this object's methods.
        copied = memo[id(self)] = object.__new__(type(self))
        original = copy.deepcopy(self._regate.original, memo)
        return _attach(copied, original, self._regate, copy.deepcopy(self._regate.override, memo))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        gating = self._regate
        made_from = gating.original, gating.engine.fresh(gating.original), gating.enabled, gating.gate
        # The override goes as state, not as an argument: it may refer to this object.
        return _rebuild, made_from, gating.override

    def __setstate__(self, override: Callable[..., Any]) -> None:
        self._regate.override = override

    def _replicate_for_data_parallel(self) -> Gated:
        replica = self._regate.original._replicate_for_data_parallel()
        return _attach(object.__new__(type(self)), replica, self._regate, self._regate.override)


def wrap(model: nn.Module, engine: Engine, gate: Gate | None = None) -> nn.Module:
    """A gated object that shares everything with `model`, which stays usable and untouched.

    A gated `model` is wrapped anew around the user's own object; an engine bound to another is made fresh.
    Raises `Unsupported` where the model has itself an argument or attribute that gating adds, holds a gated
    part, or is data-parallel or tensor-parallel already.
    """
    _check_model(model)
    return _wrap(ungated(model), engine, gate)


def ungated(model: nn.Module) -> nn.Module:
    """The user's own object behind a gated one; any other model as it is."""
    return model._regate.original if isinstance(model, Gated) else model


def find_gated(model: nn.Module) -> Any:
    """The gated model that `model` is or holds, as a container such as an adapter model does; None without one."""
    return next((module for module in model.modules() if isinstance(module, Gated)), None)


def original_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward of the user's own object: no module hooks, nothing that was assigned to `gated.forward`."""
    return ungated(model).forward


def _check_model(model: nn.Module) -> None:
    if isinstance(model, parallel_classes()):
        raise Unsupported(
            f"gating around {type(model).__name__}",
            "its communication belongs to the object it was set up on.",
            "Gate the model first, then make it parallel.",
        )
    original = ungated(model)
    if any(isinstance(module, Gated) for module in original.modules()):
        raise Unsupported(
            "gating a model twice", "a part of it is gated already.", "Gate the whole or the part."
        )
    refuse_tensor_parallel(original)
    for name in ("report", "gating", "gate"):
        if hasattr(original, name):
            raise Unsupported(
                f"a model with an attribute {name!r}",
                "the gated model has its own of that name.",
                "Rename it.",
            )


def _wrap(original: nn.Module, engine: Engine, gate: Gate | None = None) -> Gated:
    # Nothing here may need what `original` holds: in the middle of unpickling it can still be empty.
    signature = own_signature(original)
    bound = engine if engine.model is original else engine.fresh(original)
    gated = object.__new__(_gated_class(type(original), signature))
    _share(gated, Gating(original, bound, signature, gate))
    return gated


def _gated_class(own_class: type[nn.Module], signature: Signature) -> type[Gated]:
    # Not cached: the signature may be an instance's, and a class goes with the last object that needs it.
    namespace: dict[str, Any] = {
        "__module__": own_class.__module__,
        "__qualname__": own_class.__qualname__,
        "__doc__": own_class.__doc__,
        "__slots__": (),
        "_own_class": own_class,
        "forward": _Forward(_forward_function(own_class, signature)),
    }
    if hasattr(own_class, "get_base_model"):
        namespace["get_base_model"] = _gated_base_model
    bases = (Gated, own_class)
    return types.new_class(own_class.__name__, bases, exec_body=lambda body: body.update(namespace))


def _forward_function(own_class: type[nn.Module], signature: Signature) -> Callable[..., Any]:
    # It takes anything: a call without token_mask is for the user's model alone to accept or refuse.
    def forward(self: Gated, *args: Any, token_mask: Any = None, sample_id: Any = None, **kwargs: Any) -> Any:
        return respond(self, self._regate, args, kwargs, token_mask, sample_id)

    shown = gated_signature(signature)
    owner = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    # No __wrapped__: accelerate's unwrap_model would follow it past gating into the user's class.
    forward.__signature__ = shown.replace(parameters=[owner, *shown.parameters.values()])  # type: ignore[attr-defined]
    forward.__doc__ = own_class.forward.__doc__
    forward.__module__ = own_class.__module__
    forward.__qualname__ = f"{own_class.__qualname__}.forward"
    return forward


@torch._dynamo.disable
def _apart(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call that a compiled caller leaves alone: a gated one has a capture of its own."""
    return call(*args, **kwargs)


def _gated_base_model(self: Gated) -> nn.Module:
    """The base model, gated too: Trainer reads the argument names of an adapter model's batches from it."""
    gating = self._regate
    base = gating.original.get_base_model()
    if gating.base is None or ungated(gating.base) is not base:
        gating.base = _wrap(base, gating.engine.fresh(base), gating.gate)
    return gating.base


def _share(gated: Gated, gating: Gating) -> None:
    object.__setattr__(gated, "__dict__", gating.original.__dict__)
    object.__setattr__(gated, "_regate", gating)


def _attach(gated: Gated, original: nn.Module, like: Gating, override: Callable[..., Any] | None) -> Gated:
    engine = like.engine.fresh(original)
    _share(gated, Gating(original, engine, like.signature, like.gate, like.enabled, override))
    return gated


def _rebuild(original: nn.Module, engine: Engine, enabled: bool, gate: Gate | None) -> Gated:
    gated = _wrap(original, engine, gate)
    gated.gating = enabled
    return gated
