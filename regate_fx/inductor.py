"""Inductor as `torch.compile` would call it with a mode or options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from regate_fx.errors import InvalidInput

Backend = str | Callable[..., Any]


@dataclass(frozen=True)
class Inductor:
    """A Dynamo backend: Inductor with settings of its own. name: the mode, or empty."""

    settings: Mapping[str, Any]
    name: str = ""

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx  # takes seconds, and other backends need none of it

        return compile_fx(gm, example_inputs, config_patches=dict(self.settings))

    def __str__(self) -> str:
        return f"inductor, {self.name or 'with options'}"


def chosen_backend(backend: Backend, mode: str | None, options: Mapping[str, Any] | None) -> Backend:
    """The backend, with the mode or the options that `torch.compile` takes. Raises `InvalidInput`."""
    if mode is None and options is None:
        return backend
    from torch._inductor import list_mode_options, list_options

    argument = "mode" if mode is not None else "options"
    if backend != "inductor":
        raise InvalidInput(
            argument, f"is Inductor's, and the backend is {backend!r}.", "Leave out one of the two."
        )
    if mode is not None and options is not None:
        raise InvalidInput("mode", "is given together with options.", "Put the mode's settings into options.")
    if mode is not None:
        known = list_mode_options()
        if mode not in known:
            raise InvalidInput("mode", f"is {mode!r}.", f"Use one of {', '.join(map(repr, known))}.")
        return Inductor(known[mode], mode)
    assert options is not None
    settings = {name.replace("-", "_"): value for name, value in options.items()}
    if unknown := settings.keys() - set(list_options()):
        raise InvalidInput(
            "options",
            f"names {', '.join(sorted(unknown))}.",
            "See torch._inductor.list_options() for the names.",
        )
    return Inductor(settings)
