"""Ways to run a model: what each does to a small model and its batches, and how it is compiled.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import LinearNF4, Params4bit
from entries import Built
from oracle import no_cache
from peft import LoraConfig, get_peft_model
from pictures import picture_batch
from small_models import Batch
from text_batches import NO_LABEL, UserMaskBatch, text_batch
from torch import Tensor, nn

LOOSE = 3e-4  # of the size: what float32 may be off where the untouched model happens to be closer
LOOSE_BFLOAT16 = 3e-2  # its rounding is 2^-8


class NotApplicable(Exception):
    """A model cannot be run in a way; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A model to compile, and what the oracle runs.

    plain: the same parameters, run as it is. options: of `regate_fx.compile`. around: entered for each step but not
    for the golden one.
    """

    model: nn.Module
    plain: nn.Module
    batches: Callable[[torch.Generator], Iterator[tuple[str, Batch]]]
    options: Mapping[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    loose: float = LOOSE


Way = Callable[[Built], Prepared]


def plainly(built: Built) -> Prepared:
    return _prepared(built)


def checkpointing(built: Built) -> Prepared:
    """Layers computed again in the backward pass."""
    plain = _copy(built.model)
    try:
        built.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    except ValueError as error:
        raise NotApplicable(str(error)) from error
    return _prepared(built, plain=plain)


def bfloat16_autocast(built: Built) -> Prepared:
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    return _prepared(built, around=autocast, loose=LOOSE_BFLOAT16)


def lora(built: Built) -> Prepared:
    """Adapters at every linear layer. The oracle knows no random numbers: dropout is on in training mode, not here."""
    # Both factors random: with the usual B = 0 half of the gradients would be zero.
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1)
    try:
        model = get_peft_model(built.model, adapter).eval()
        _run(model, text_batch(torch.Generator(), 2, 5, None))
    except Exception as error:
        raise NotApplicable(_first_line(error)) from error
    return _prepared(replace(built, model=model))


def four_bit(built: Built) -> Prepared:
    """Frozen 4-bit weights under adapters, as QLoRA has it; the oracle runs dense layers of the same weights.

    By hand where models are loaded with a `quantization_config`, and by the same rule: all linear layers but the last.
    """
    output = built.model.get_output_embeddings()
    linear = {
        name: module
        for name, module in built.model.named_modules()
        if type(module) is nn.Linear and module is not output
    }
    quantised = _copy(built.model)
    for name, dense in linear.items():
        layer = _four_bit(dense)
        dense.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        quantised.set_submodule(name, layer)
    adapter = LoraConfig(r=4, target_modules=list(linear), init_lora_weights=False)
    try:
        plain, model = (get_peft_model(each, adapter) for each in (built.model, quantised))
        adapters = {name: value for name, value in plain.state_dict().items() if "lora_" in name}
        model.load_state_dict(adapters, strict=False)
        # In training mode: in the other one its layers pack their weights anew for the CPU when they first run.
        _run(model, text_batch(torch.Generator(), 2, 5, None))
    except Exception as error:
        raise NotApplicable(_first_line(error)) from error
    return _prepared(replace(built, model=model), plain=plain)


def _four_bit(dense: nn.Linear) -> LinearNF4:
    made = LinearNF4(
        dense.in_features, dense.out_features, dense.bias is not None, compute_dtype=torch.float32
    )
    made.weight = Params4bit(dense.weight.data.clone(), requires_grad=False, quant_type="nf4")
    made.bias = dense.bias
    return made.to("cpu")


def custom_mask(built: Built) -> Prepared:
    """A mask of the user's for each pair of positions."""

    def batches(generator: torch.Generator) -> Iterator[tuple[str, Batch]]:
        for B, S in ((3, 11), (2, 8)):
            batch = text_batch(generator, B, S, None)
            seen = torch.rand(B, 1, S, S, generator=generator) < 0.7
            seen = (seen | torch.eye(S, dtype=torch.bool)).tril()
            yield f"custom mask, S {S}", UserMaskBatch(**vars(batch), mask=_additive(seen))

    return _prepared(built, _applicable(built, batches))


def positions(built: Built) -> Prepared:
    """Positions of the user's, unevenly spaced: neither the index nor the packed row could stand in for them."""

    def batches(generator: torch.Generator) -> Iterator[tuple[str, Batch]]:
        for B, S in ((3, 9), (2, 12)):
            batch = text_batch(generator, B, S, "right")
            steps = torch.randint(1, 3, (B, S), generator=generator)
            yield f"positions, S {S}", replace(batch, position_ids=steps.cumsum(1))

    return _prepared(built, _applicable(built, batches, "position_ids"))


def packed(built: Built) -> Prepared:
    """Documents one after the other in a row, told apart by positions that start again."""

    def batches(generator: torch.Generator) -> Iterator[tuple[str, Batch]]:
        for lengths in ((5, 8, 3), (4, 2, 7)):
            batch = text_batch(generator, 1, sum(lengths), None)
            document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
            labels = batch.labels.index_fill(1, starts, NO_LABEL)  # of another document's last word
            numbers = (torch.arange(sum(lengths)) - starts[document])[None]
            seen = (document[:, None] == document[None, :]).tril()[None, None]
            batch = replace(batch, labels=labels, position_ids=numbers)
            yield f"packed {lengths}", UserMaskBatch(**vars(batch), mask=_additive(seen), shown=False)

    prepared = _prepared(built, _applicable(built, batches, "position_ids"))
    _, batch = next(batches(torch.Generator().manual_seed(1)))
    assert isinstance(batch, UserMaskBatch)
    try:
        by_position, by_mask = (_run(built.model, given) for given in (batch, replace(batch, shown=True)))
    except Exception as error:
        raise NotApplicable(_first_line(error)) from error
    if not torch.allclose(by_position, by_mask, rtol=1e-3, atol=1e-3):
        raise NotApplicable("it does not tell documents apart by their positions")
    return prepared


def layer_by_layer(built: Built) -> Prepared:
    return _prepared(built, options={"scope": "layers"})


def inductor(built: Built) -> Prepared:
    return _prepared(built, options={"backend": "inductor"})


WAYS: dict[str, Way] = {
    way.__name__: way
    for way in (
        checkpointing, bfloat16_autocast, lora, four_bit, custom_mask, positions, packed, layer_by_layer, inductor,
    )
}  # fmt: skip


def applied(built: Built, first: int) -> tuple[str, Prepared]:
    """The first way that applies, beginning with number `first`; each is tried on a model of its own."""
    names = list(WAYS)
    for step in range(len(names)):
        name = names[(first + step) % len(names)]
        try:
            return name, WAYS[name](replace(built, model=_copy(built.model)))
        except NotApplicable:
            continue
    raise NotApplicable("no way applies")


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # a model that keeps states of its last run
        raise NotApplicable(_first_line(error)) from error


def _prepared(
    built: Built, batches: Callable[..., Any] | None = None, plain: nn.Module | None = None, **others: Any
) -> Prepared:
    given = batches or (lambda generator: default_batches(built, generator))
    return Prepared(built.model, plain or built.model, given, **others)


def default_batches(built: Built, generator: torch.Generator) -> Iterator[tuple[str, Batch]]:
    """Pictures where they are seen, and text with each kind of padding."""
    model = built.model
    if built.pictures is not None:
        yield "pictures", picture_batch(model, built.pictures, generator, "right")
        yield "pictures, left padding", picture_batch(model, built.pictures, generator, "left")
    if not built.on_text:
        return
    yield "right padding", text_batch(generator, 3, 11, "right")
    yield "left padding", text_batch(generator, 2, 13, "left")
    yield "no mask", text_batch(generator, 4, 9, None)


def _applicable(built: Built, batches: Callable[..., Any], argument: str | None = None) -> Callable[..., Any]:
    """The batches, if the untouched model takes them and makes something of what the user gives."""
    if not built.on_text:
        raise NotApplicable("it does not train on text alone")
    if argument is not None and argument not in inspect.signature(built.model.forward).parameters:
        raise NotApplicable(f"it takes no {argument}")
    _, batch = next(batches(torch.Generator().manual_seed(1)))
    bare = replace(batch, position_ids=None, **({"shown": False} if isinstance(batch, UserMaskBatch) else {}))
    try:
        changed = not torch.allclose(_run(built.model, batch), _run(built.model, bare), rtol=1e-3, atol=1e-3)
    except Exception as error:
        raise NotApplicable(_first_line(error)) from error
    if not changed:
        raise NotApplicable("what the user gives changes nothing")
    return batches


def _additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@torch.no_grad()
def _run(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch.model_inputs(), **no_cache(model)).logits


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
