"""The arguments of a gated call: bound to the model's own signature, checked before anything is computed.

Shapes: B samples, S positions of the decoder's input, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor

from regate_fx.errors import InvalidInput, Unsupported
from regate_fx.plan import TokenPlan, check_token_mask, make_plan

ADDED_ARGUMENTS = ("token_mask", "sample_id")


@dataclass(frozen=True)
class GatedCall:
    """A checked call.

    inputs: the arguments the caller gave, by name, without None. `return_dict` is in it, as True, only where
    the model's config asks for tuples: a forward called with `inputs` returns a `ModelOutput`.
    as_tuple: the caller wants a tuple.
    """

    plan: TokenPlan
    inputs: dict[str, Any]
    as_tuple: bool


@dataclass(frozen=True)
class _Refused:
    argument: str
    why: str
    remedy: str
    also_from_config: bool = False


_NO_CACHE = "a gated call computes the whole sequence and keeps no cache."
_CACHE_REMEDY = "Pass the whole sequence and use_cache=False, or leave out token_mask."
_PACKED = "its sequence boundaries cannot be composed with token_mask."
_UNPACK = "Pass one document per row, with an attention_mask."
_STATES = "elided positions have no state of their own to return."
_LOSS = "it changes the loss in a way the per-token losses would not show."
_UNGATED = "Leave out token_mask for this call."

_REFUSED = (
    _Refused("past_key_values", _NO_CACHE, _CACHE_REMEDY),
    _Refused("use_cache", _NO_CACHE, _CACHE_REMEDY),
    _Refused("output_hidden_states", _STATES, _UNGATED, also_from_config=True),
    _Refused("output_attentions", _STATES, _UNGATED, also_from_config=True),
    _Refused("cu_seq_lens_q", _PACKED, _UNPACK),
    _Refused("cu_seq_lens_k", _PACKED, _UNPACK),
    _Refused("max_length_q", _PACKED, _UNPACK),
    _Refused("max_length_k", _PACKED, _UNPACK),
    _Refused("logits_to_keep", "a gated call already computes the active positions only.", _UNGATED),
    _Refused("shift_labels", "the model pairs labels and positions itself.", "Pass unshifted labels."),
    _Refused("label_smoothing", _LOSS, "Train without label smoothing."),
    _Refused("label_smoothing_factor", _LOSS, "Train without label smoothing."),
)


def gated_signature(signature: Signature) -> Signature:
    """The model's own signature plus keyword-only `token_mask=None` and `sample_id=None`.

    Raises `Unsupported` when the model has an argument of that name itself.
    """
    for name in ADDED_ARGUMENTS:
        if name in signature.parameters:
            raise Unsupported(
                f"a model whose forward already takes {name!r}",
                "a gated call could not tell the two apart.",
                "Rename the model's argument.",
            )
    parameters = list(signature.parameters.values())
    rest = [parameters.pop()] if parameters and parameters[-1].kind is Parameter.VAR_KEYWORD else []
    added = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in ADDED_ARGUMENTS]
    return signature.replace(parameters=[*parameters, *added, *rest])


def check_call(
    signature: Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    token_mask: object,
    config: object,
    sizes: tuple[int, int] | None = None,
) -> GatedCall:
    """Bind and check the arguments of a gated call, and build its plan.

    signature is the model's own; token_mask: bool [B, S]; config is the model's, or None; sizes as in `make_plan`.
    Raises `InvalidInput` or `Unsupported` with the name of the argument, `TypeError` as any Python call does.
    """
    inputs = bind(signature, args, kwargs)
    by_default = getattr(config, "return_dict", True)
    return_dict = inputs.pop("return_dict", by_default)
    if not by_default:
        inputs["return_dict"] = True
    _refuse(inputs, config)
    mask_name, tokens = decoder_input(signature, inputs, config)
    B, S = tokens.shape[:2]
    checked = check_token_mask(token_mask, B, S, tokens.device)
    attention_mask = _padding_mask(mask_name, inputs.get(mask_name), tokens)
    if "labels" in inputs:
        _check_labels(inputs["labels"], tokens)
    plan = make_plan(checked, attention_mask, sizes)
    _refuse_blind_positions(mask_name, inputs.get(mask_name), plan.row_of >= 0)
    return GatedCall(plan, inputs, as_tuple=not return_dict)


def bind(signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, without None. Raises `InvalidInput` for one that has no name."""
    inputs: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is Parameter.VAR_KEYWORD:
            inputs.update(value)
        elif kind in (Parameter.VAR_POSITIONAL, Parameter.POSITIONAL_ONLY):
            raise InvalidInput(name, "a gated call needs the name of every argument.", "Pass it by keyword.")
        else:
            inputs[name] = value
    return {name: value for name, value in inputs.items() if value is not None}


def _refuse(inputs: Mapping[str, Any], config: object) -> None:
    for refused in _REFUSED:
        value = inputs.get(refused.argument)
        if value is None and refused.also_from_config:
            value = getattr(config, refused.argument, None)
        if value is None or (isinstance(value, bool | int | float) and not value):
            continue
        shown = f"={value}" if isinstance(value, bool) else ""
        raise Unsupported(f"{refused.argument}{shown} with token_mask", refused.why, refused.remedy)


def decoder_input(
    signature: Signature, inputs: Mapping[str, Any], config: object = None
) -> tuple[str, Tensor]:
    """The name of the decoder's padding mask, and its input: ids [B, S] or embeddings [B, S, D]."""
    two_stacks = "decoder_input_ids" in signature.parameters and _may_have_encoder(config)
    prefix = "decoder_" if two_stacks or feeds_decoder(inputs) else ""
    ranks = {f"{prefix}input_ids": 2, f"{prefix}inputs_embeds": 3}
    for name, rank in ranks.items():
        tokens = inputs.get(name)
        if tokens is None:
            continue
        if not isinstance(tokens, Tensor) or tokens.ndim != rank:
            got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            wanted = "[B, S]" if rank == 2 else "[B, S, D]"
            raise InvalidInput(name, f"expected a tensor {wanted}, got {got}.", "Give one row per sample.")
        return f"{prefix}attention_mask", tokens
    ids, embeds = ranks
    raise InvalidInput(
        ids, f"neither {ids} nor {embeds} was given.", "token_mask needs one of them for its shape."
    )


def _may_have_encoder(config: object) -> bool:
    """False where a config says that neither the model nor its language model has one (BLIP-2 over OPT, say)."""
    parts = [part for part in (config, getattr(config, "text_config", None)) if part is not None]
    return not parts or any(getattr(part, "is_encoder_decoder", False) for part in parts)


def feeds_decoder(inputs: Mapping[str, Any]) -> bool:
    """Whether a call has an input for a decoder, so that `input_ids` and `attention_mask` are an encoder's."""
    return any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))


def padding_mask_name(inputs: Mapping[str, Any]) -> str:
    """The argument that says which of the decoder's positions are padding."""
    return "decoder_attention_mask" if feeds_decoder(inputs) else "attention_mask"


def padding_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """The padding mask [B, S] among the checked inputs of a call; None without one, or with one over pairs."""
    mask = inputs.get(padding_mask_name(inputs))
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _padding_mask(name: str, mask: object, tokens: Tensor) -> Tensor | None:
    """`mask` if padding can be read from it ([B, S]); None for a mask over pairs of positions."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    if mask.shape != tokens.shape[:2]:
        raise InvalidInput(
            name,
            f"expected shape {list(tokens.shape[:2])} like the decoder's input, got {list(mask.shape)}.",
            "Give one entry per position, zero at padding.",
        )
    _check_device(name, mask, tokens)
    return mask


def _refuse_blind_positions(name: str, mask: object, active: Tensor) -> None:
    """Raise `InvalidInput` where all that an active position sees by a mask over pairs [B, H, S, S] is elided.

    Its attention would be over nothing, which no two ways to compute it agree on. A position that sees nothing in the
    untouched model either, as padding, is the caller's own. active: bool [B, S]. On an accelerator it is an
    asynchronous assertion.
    """
    masks = list(mask.values()) if isinstance(mask, Mapping) else [mask]
    for pairs in masks:
        if not isinstance(pairs, Tensor) or pairs.ndim != 4 or pairs.is_meta:
            continue
        B, S = active.shape
        if pairs.shape[0] not in (1, B) or pairs.shape[2:] != (S, S) or pairs.device != active.device:
            continue  # for the model to make sense of
        hidden = torch.finfo(pairs.dtype).min / 2 if pairs.is_floating_point() else 0
        sees = pairs > hidden
        blind = sees.any(-1) & ~(sees & active[:, None, None, :]).any(-1) & active[:, None, :]
        if pairs.device.type != "cpu":
            torch._assert_async(~blind.any(), f"{name}: all that an active position sees is elided")
        elif bool(blind.any()):
            sample, _, position = blind.nonzero()[0].tolist()
            raise InvalidInput(
                name,
                f"all positions that position {position} of sample {sample} sees are elided, it itself is not.",
                "Keep one of them in token_mask, or elide the position too.",
            )


def _check_labels(labels: object, tokens: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise InvalidInput("labels", f"expected a tensor, got {type(labels).__name__}.", "Pass int64 [B, S].")
    if labels.shape != tokens.shape[:2]:
        raise InvalidInput(
            "labels",
            f"expected shape {list(tokens.shape[:2])} like the decoder's input, got {list(labels.shape)}.",
            "Give one label per position, -100 where there is none.",
        )
    if labels.dtype != torch.int64:
        raise InvalidInput("labels", f"expected dtype torch.int64, got {labels.dtype}.", "Use labels.long().")
    _check_device("labels", labels, tokens)


def _check_device(name: str, tensor: Tensor, tokens: Tensor) -> None:
    if tensor.device != tokens.device:
        raise InvalidInput(
            name,
            f"is on {tensor.device}, the batch on {tokens.device}.",
            f"Move it with .to({str(tokens.device)!r}).",
        )


def own_signature(model: torch.nn.Module) -> Signature:
    """The signature of the forward that `model` runs, an override on the instance included."""
    return inspect.signature(model.forward)
