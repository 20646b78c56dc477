"""Capture and run a model whose layers are sharded by FSDP2.

A sharded layer holds its parameters only while it runs, so there is no moment at which the whole model could be
captured. Stand-ins of full size without memory take the parameters' places while it is; each part of the split graph
then runs where its layer would have, between the hooks that gather and free the real ones.

Shapes: whatever the parameters have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regate_fx.errors import Unsupported
from regate_fx.layerwise import Compiled, LayerwiseGraph
from regate_fx.passes.split_layers import Part

Hooks = dict[int, Any]


@dataclass(frozen=True)
class Place:
    """Where a sharded parameter lives: attribute `name` of `module`, gathered by the hooks of `unit`."""

    module: nn.Module
    name: str
    unit: nn.Module


class Sharding:
    """The sharded parameters of a model, and how to do without them while it is captured."""

    def __init__(self, model: nn.Module) -> None:
        """Gathers each unit once, to see what its parameters are like."""
        self._units = [unit for unit in _units(model) if _sharded(unit)]
        self._places: dict[Place, nn.Parameter] = {}
        self._by_stand_in: dict[int, Place] = {}
        self._real: dict[Place, nn.Parameter | None] = {}
        self._hooks: dict[nn.Module, tuple[Hooks, Hooks]] = {}
        for unit in self._units:
            self._add(unit)

    def _add(self, unit: Any) -> None:
        sharded = _sharded(unit)
        unit.unshard()
        known: dict[int, nn.Parameter] = {}
        for module, name in sharded:
            full = module._parameters[name]
            assert full is not None
            if id(full) not in known:
                known[id(full)] = _stand_in(full)
            place = Place(module, name, unit)
            self._places[place] = known[id(full)]
            self._by_stand_in.setdefault(id(known[id(full)]), place)
        unit.reshard()

    @property
    def is_current(self) -> bool:
        """Whether the same parameters are sharded still."""
        return all(_is_sharded(place.module._parameters[place.name]) for place in self._places)

    def place_of(self, value: Any) -> Place | None:
        return self._by_stand_in.get(id(value))

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        """While active, stand-ins are in place and no unit gathers or frees anything."""
        self._real = {place: place.module._parameters[place.name] for place in self._places}
        self._hooks = {unit: _all_hooks(unit) for unit in self._units}
        with self._having(self._places, of_fsdp=False):
            yield

    @contextlib.contextmanager
    def _having(self, parameters: Mapping[Place, nn.Parameter | None], of_fsdp: bool) -> Iterator[None]:
        """While active, these parameters are in place, and of the units' hooks those of FSDP2, or the others."""
        before = {place: place.module._parameters[place.name] for place in parameters}
        hooks = {unit: _all_hooks(unit) for unit in self._units}
        for place, parameter in parameters.items():
            place.module._parameters[place.name] = parameter
        for unit in self._units:
            _set_hooks(unit, self._hooks[unit], lambda hook: _is_of_fsdp(hook) is of_fsdp)
        try:
            yield
        finally:
            for place, parameter in before.items():
                place.module._parameters[place.name] = parameter
            for unit in self._units:
                _set_hooks(unit, hooks[unit], lambda hook: True)

    def run(self, graph: LayerwiseGraph, args: Sequence[Any]) -> Any:
        """Run a graph that was captured with stand-ins, on the real parameters; from within `captured`.

        Raises `Unsupported` where a unit's parameters are needed in several parts, or not gathered when they are.
        """
        owners: dict[nn.Module, int] = {}

        def call(part: Part, compiled: Compiled, values: list[Any]) -> Any:
            places = [place for value in values if (place := self.place_of(value)) is not None]
            units = [unit for unit in self._units if any(place.unit is unit for place in places)]
            for unit in units:
                if owners.setdefault(unit, part.layer) != part.layer:
                    raise _not_by_layer(unit)
            return self._run_inside(units, compiled, values)

        # What else is hooked to a unit was captured with it, and runs inside the graph.
        with self._having(self._real, of_fsdp=True):
            return graph.run(args, call)

    def _run_inside(self, units: Sequence[nn.Module], compiled: Compiled, values: list[Any]) -> Any:
        """The states that carry a gradient pass through the hooks: these tell from them when the backward pass enters
        and leaves the unit."""
        carried = [index for index, value in enumerate(values) if self._carries_gradient(value)]

        def run(*states: Tensor) -> Any:
            for index, state in zip(carried, states, strict=True):
                values[index] = state
            return compiled(*(self._gathered(value) for value in values))

        call: Compiled = run
        for unit in reversed(units):
            call = _inside(unit, call)
        return call(*(values[index] for index in carried))

    def _carries_gradient(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            return False
        return value.requires_grad and self.place_of(value) is None

    def _gathered(self, value: Any) -> Any:
        place = self.place_of(value)
        if place is None:
            return value
        parameter = place.module._parameters[place.name]
        if _is_sharded(parameter):
            raise _not_by_layer(place.unit)
        return parameter


def find_sharding(model: nn.Module, known: Sharding | None) -> Sharding | None:
    """The sharding of a model at this moment; `known` if nothing has changed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    if known is not None and known.is_current:
        return known
    return Sharding(model) if any(_sharded(unit) for unit in _units(model)) else None


def _not_by_layer(unit: nn.Module) -> Unsupported:
    return Unsupported(
        f"FSDP2 around a {type(unit).__name__} that is not one decoder layer",
        "its parameters are needed before or after it runs.",
        "Apply fully_shard to each decoder layer, and then to the gated model.",
    )


def _inside(unit: nn.Module, function: Compiled) -> Compiled:
    """`function` between the hooks of a module, as if it were its forward."""

    def call(*states: Tensor) -> Any:
        forward = unit.__dict__.pop("forward", None)
        unit.forward = function
        try:
            return unit(*states)
        finally:
            del unit.__dict__["forward"]
            if forward is not None:
                unit.forward = forward

    return call


def _units(model: nn.Module) -> list[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _sharded(unit: nn.Module) -> list[tuple[nn.Module, str]]:
    """The sharded parameters of a unit, without those of units inside."""
    inner = {id(m) for other in _units(unit) if other is not unit for m in other.modules()}
    return [
        (module, name)
        for module in unit.modules()
        if id(module) not in inner
        for name, parameter in module._parameters.items()
        if parameter is not None and _is_sharded(parameter)
    ]


def _is_sharded(parameter: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _stand_in(parameter: Tensor) -> nn.Parameter:
    empty = torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device
    )
    empty.untyped_storage().resize_(0)
    return nn.Parameter(empty, parameter.requires_grad)


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


def _all_hooks(module: nn.Module) -> tuple[Hooks, Hooks]:
    return dict(module._forward_pre_hooks), dict(module._forward_hooks)


def _set_hooks(module: nn.Module, hooks: tuple[Hooks, Hooks], keep: Callable[[Any], bool]) -> None:
    for own, wanted in zip((module._forward_pre_hooks, module._forward_hooks), hooks, strict=True):
        own.clear()
        own.update({number: hook for number, hook in wanted.items() if keep(hook)})
