"""The gated model: to everything else it is the user's own.

`wrap` makes a second object of a class derived from the user's. Both objects share one `__dict__`, and
with it parameters, buffers, submodules, hooks, mode and config. The gated one adds its own `forward`; what
it has to remember lives in a slot, so that nothing of it reaches the user's object, a state dict or `to()`.
"""

from __future__ import annotations

import copy
import functools
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from regate_fx.errors import Bypassed, InvalidInput, Unsupported
from regate_fx.inputs import bind, check_call, gated_signature, own_signature
from regate_fx.plan import TokenPlan

logger = logging.getLogger("regate_fx")


class Engine(Protocol):
    """Computes gated calls of one model.

    model: the user's own object, never a gated one.
    report: what happened to each layer; None before the first gated call.
    """

    model: nn.Module

    def __call__(self, plan: TokenPlan, inputs: dict[str, Any]) -> Any:
        """The output of one gated call, a `ModelOutput`; `inputs` as in `GatedCall`."""

    def fresh(self, model: nn.Module) -> Engine:
        """The same options for another model.

        The result must pickle, and must not look into `model` before its first call: it may be half built.
        """

    @property
    def report(self) -> Any: ...


class Choice(Protocol):
    """token_mask: bool [B, S]; active: N and L where they are known on the host, see `make_plan`."""

    @property
    def token_mask(self) -> Tensor: ...

    @property
    def active(self) -> tuple[int, int] | None: ...


class Gate(Protocol):
    """Chooses the positions to compute in training, from batches that carry `sample_id`."""

    def follow(self, model: nn.Module) -> None:
        """Called before each choice, to notice that an optimizer has stepped."""

    def choose(self, batch: Mapping[str, Any]) -> Choice:
        """The positions to compute for a batch: the arguments of the call by name, `sample_id` among them.

        Refuses a `num_items_in_batch` that counts other labels than those this choice leaves.
        """

    def take_in(self, choice: Any, output: Any) -> None:
        """Called with the choice and what the call is about to return."""


@dataclass
class _Gating:
    original: nn.Module
    engine: Engine
    signature: Signature
    gate: Gate | None = None
    enabled: bool = True
    override: Callable[..., Any] | None = None
    base: Gated | None = None
    entered: int = 0
    is_warned: bool = False
    is_checked: bool = False


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
    _regate: _Gating
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
    if isinstance(model, _parallel_classes()):
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
    _refuse_tensor_parallel(original)
    for name in ("report", "gating", "gate"):
        if hasattr(original, name):
            raise Unsupported(
                f"a model with an attribute {name!r}",
                "the gated model has its own of that name.",
                "Rename it.",
            )


def _refuse_tensor_parallel(model: nn.Module) -> None:
    """FSDP2 shards parameters along one axis of ranks and gathers them to run; what is split besides stays split."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    gathered = {id(parameter) for unit in units for parameter in unit.parameters()}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        splits = sum(not placement.is_replicate() for placement in parameter.placements)
        if splits > (id(parameter) in gathered):
            raise Unsupported(
                "tensor parallelism",
                f"{name} is split among ranks, which would have to compute the same positions together.",
                "Use data parallelism, or FSDP2 with scope='layers'.",
            )


def _parallel_classes() -> tuple[type, ...]:
    classes: tuple[type, ...] = (DataParallel, DistributedDataParallel)
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        classes += (FSDPModule, FullyShardedDataParallel)
    return classes


def _wrap(original: nn.Module, engine: Engine, gate: Gate | None = None) -> Gated:
    # Nothing here may need what `original` holds: in the middle of unpickling it can still be empty.
    signature = own_signature(original)
    bound = engine if engine.model is original else engine.fresh(original)
    gated = object.__new__(_gated_class(type(original), signature))
    _share(gated, _Gating(original, bound, signature, gate))
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
        gating = self._regate
        gating.entered += 1
        if not gating.enabled:
            return gating.original.forward(*args, **kwargs)
        if sample_id is not None:
            _check_sample_id(gating.gate, token_mask)
        if token_mask is not None:
            _warn_of_count(gating, kwargs)
            return _as_asked(*_gated_call(self, args, kwargs, token_mask))
        trains = self.training and (sample_id is not None or _labelled(signature, args, kwargs))
        if gating.gate is None or not trains:
            return gating.original.forward(*args, **kwargs)
        return _as_asked(*_selected_call(self, gating.gate, args, kwargs, sample_id))

    shown = gated_signature(signature)
    owner = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    # No __wrapped__: accelerate's unwrap_model would follow it past gating into the user's class.
    forward.__signature__ = shown.replace(parameters=[owner, *shown.parameters.values()])  # type: ignore[attr-defined]
    forward.__doc__ = own_class.forward.__doc__
    forward.__module__ = own_class.__module__
    forward.__qualname__ = f"{own_class.__qualname__}.forward"
    return forward


def _warn_of_count(gating: _Gating, kwargs: dict[str, Any]) -> None:
    """Say once what a number of labels has to count. Whether it does is known only after every batch of the step."""
    if kwargs.get("num_items_in_batch") is None or gating.is_warned:
        return
    gating.is_warned = True
    logger.warning(
        "num_items_in_batch with token_mask has to be the number of counted labels (out.counted) of the optimizer "
        "step; if it is that of all labels, the loss shrinks with the share of tokens kept. Trainer passes the "
        "number of all labels; with trainer.model_accepts_loss_kwargs = False it passes none."
    )


@torch._dynamo.disable
def _apart(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call that a compiled caller leaves alone: a gated one has a capture of its own."""
    return call(*args, **kwargs)


def _check_sample_id(gate: Gate | None, token_mask: Any) -> None:
    if gate is None:
        raise Unsupported(
            "sample_id",
            "only a gate can use it, and this model was compiled without one.",
            "Compile it with gate=..., or leave sample_id out.",
        )
    if token_mask is not None:
        raise InvalidInput(
            "token_mask",
            "was given together with sample_id.",
            "Choose the mask yourself, or let the gate do it.",
        )


def _labelled(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = signature.bind_partial(*args).arguments.get("labels") if args else None
    return given is not None or kwargs.get("labels") is not None


def _selected_call(
    gated: Gated, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any], sample_id: Any
) -> tuple[Any, bool]:
    """A training call whose mask the gate chooses."""
    batch = bind(gated._regate.signature, args, kwargs)
    gate.follow(gated)
    choice = gate.choose({**batch, "sample_id": sample_id})
    output, as_tuple = _gated_call(gated, args, kwargs, choice.token_mask, choice.active)
    gate.take_in(choice, output)
    return output, as_tuple


def _gated_call(
    gated: Gated,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    token_mask: Any,
    sizes: tuple[int, int] | None = None,
) -> tuple[Any, bool]:
    """The output of a gated call, and whether the caller wants a tuple."""
    if getattr(gated, "_is_replica", False):
        raise Unsupported(
            "token_mask under nn.DataParallel",
            "its replicas would share one compiled model.",
            "Use DistributedDataParallel.",
        )
    if getattr(getattr(gated, "active_peft_config", None), "is_prompt_learning", False):
        raise Unsupported(
            "token_mask with a prompt-learning adapter",
            "it puts positions of its own before the batch's, for which the mask has no entry.",
            "Use another kind of adapter.",
        )
    gating = gated._regate
    if not gating.is_checked:
        _refuse_tensor_parallel(gating.original)
        gating.is_checked = True
    config = getattr(gated, "config", None)
    call = check_call(gating.signature, args, kwargs, token_mask, config, sizes)
    return gating.engine(call.plan, call.inputs), call.as_tuple


def _as_asked(output: Any, as_tuple: bool) -> Any:
    return output.to_tuple() if as_tuple else output


def _gated_base_model(self: Gated) -> nn.Module:
    """The base model, gated too: Trainer reads the argument names of an adapter model's batches from it."""
    gating = self._regate
    base = gating.original.get_base_model()
    if gating.base is None or ungated(gating.base) is not base:
        gating.base = _wrap(base, gating.engine.fresh(base), gating.gate)
    return gating.base


def _share(gated: Gated, gating: _Gating) -> None:
    object.__setattr__(gated, "__dict__", gating.original.__dict__)
    object.__setattr__(gated, "_regate", gating)


def _attach(gated: Gated, original: nn.Module, like: _Gating, override: Callable[..., Any] | None) -> Gated:
    engine = like.engine.fresh(original)
    _share(gated, _Gating(original, engine, like.signature, like.gate, like.enabled, override))
    return gated


def _rebuild(original: nn.Module, engine: Engine, enabled: bool, gate: Gate | None) -> Gated:
    gated = _wrap(original, engine, gate)
    gated.gating = enabled
    return gated
