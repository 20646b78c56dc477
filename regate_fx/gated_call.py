"""One gated call, from the arguments of `forward` to the engine's output.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import logging
from inspect import Signature
from typing import Any

from torch import nn

from regate_fx.errors import InvalidInput, Unsupported
from regate_fx.gating import Gate, Gating
from regate_fx.inputs import bind, check_call
from regate_fx.parallel import refuse_tensor_parallel

logger = logging.getLogger("regate_fx")


def respond(
    gated: nn.Module,
    gating: Gating,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    token_mask: Any,
    sample_id: Any,
) -> Any:
    """What `gated.forward` returns: a gated call's output where a mask is given or chosen, else the model's own."""
    gating.entered += 1
    if not gating.enabled:
        return gating.original.forward(*args, **kwargs)
    if sample_id is not None:
        _check_sample_id(gating.gate, token_mask)
    if token_mask is not None:
        _warn_of_count(gating, kwargs)
        return _as_asked(*_gated_call(gated, gating, args, kwargs, token_mask))
    trains = gated.training and (sample_id is not None or _labelled(gating.signature, args, kwargs))
    if gating.gate is None or not trains:
        return gating.original.forward(*args, **kwargs)
    return _as_asked(*_selected_call(gated, gating, gating.gate, args, kwargs, sample_id))


def _warn_of_count(gating: Gating, kwargs: dict[str, Any]) -> None:
    """Say once what a number of labels has to count. Whether it does is known only after every batch of the step."""
    if kwargs.get("num_items_in_batch") is None or gating.is_warned:
        return
    gating.is_warned = True
    logger.warning(
        "num_items_in_batch with token_mask has to be the number of counted labels (out.counted) of the optimizer "
        "step; if it is that of all labels, the loss shrinks with the share of tokens kept. Trainer passes the "
        "number of all labels; with trainer.model_accepts_loss_kwargs = False it passes none."
    )


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
    gated: nn.Module,
    gating: Gating,
    gate: Gate,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sample_id: Any,
) -> tuple[Any, bool]:
    """A training call whose mask the gate chooses."""
    batch = bind(gating.signature, args, kwargs)
    gate.follow(gated)
    choice = gate.choose({**batch, "sample_id": sample_id})
    output, as_tuple = _gated_call(gated, gating, args, kwargs, choice.token_mask, choice.active)
    gate.take_in(choice, output)
    return output, as_tuple


def _gated_call(
    gated: nn.Module,
    gating: Gating,
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
    if not gating.is_checked:
        refuse_tensor_parallel(gating.original)
        gating.is_checked = True
    config = getattr(gated, "config", None)
    call = check_call(gating.signature, args, kwargs, token_mask, config, sizes)
    return gating.engine(call.plan, call.inputs), call.as_tuple


def _as_asked(output: Any, as_tuple: bool) -> Any:
    return output.to_tuple() if as_tuple else output
