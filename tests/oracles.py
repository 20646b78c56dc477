"""What a gated step must compute, found three times without the compiler.

Nothing here imports the project. Each oracle runs the user's own model, not compiled:

1. `run_untouched`: the model as it is, the answer when every position is active.
2. `run_key_masked`: the full run in which no position sees an elided key.
3. `run_subsequences`: every sample's active tokens alone, at their original positions.

`golden` is oracle 2 with every operation in float64; `check_step` measures a gated step against it.

Shapes: B samples, S positions, V vocabulary, K active positions of one sample.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from comparison import Outcome, compare
from small_models import Batch, SmallModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NO_LABEL = -100

Oracle = Callable[..., Outcome]


def counted_labels(small: SmallModel, batch: Batch) -> Tensor:
    """bool [B, S]: the labels whose predictor is active."""
    predictor_active = batch.active
    if small.shifted:
        predictor_active = F.pad(batch.active[:, :-1], (1, 0), value=False)
    return predictor_active & (batch.labels != NO_LABEL)


def original_positions(small: SmallModel, batch: Batch) -> Tensor:
    """int64 [B, S]: how the untouched model numbers the tokens of this batch."""
    if batch.position_ids is not None:
        return batch.position_ids
    if small.positions == "unpadded":
        return batch.real.long().cumsum(1) * batch.real - 1
    B, S = batch.input_ids.shape
    return torch.arange(S).expand(B, S)


def run_untouched(model: nn.Module, small: SmallModel, batch: Batch, **loss_kwargs: Any) -> Outcome:
    """Oracle 1: `model` called as its user would, the token mask ignored. It must be all True."""
    if not batch.active.all():
        raise ValueError("oracle 1 holds for batches whose every position is active")
    return _step(model, small, batch, batch.model_inputs(), **loss_kwargs)


def run_key_masked(model: nn.Module, small: SmallModel, batch: Batch, **loss_kwargs: Any) -> Outcome:
    """Oracle 2: the full run with elided keys masked, positions as in the original."""
    inputs = {**batch.model_inputs(), "attention_mask": batch.active.long()}
    with _numbered_as_in_original(model, small, batch, inputs):
        return _step(model, small, batch, inputs, **loss_kwargs)


def run_subsequences(model: nn.Module, small: SmallModel, batch: Batch) -> Outcome:
    """Oracle 3: each sample's active tokens alone.

    Raises `NotApplicableError` where a subsequence means something else.
    """
    if small.windowed:
        raise NotApplicableError("a window by index reaches further back in a subsequence")
    if small.positions == "index" and not _accepts(model, "position_ids"):
        raise NotApplicableError("the model numbers its input by index and takes no position_ids")
    return _run_alone(model, small, batch)


def _run_alone(model: nn.Module, small: SmallModel, batch: Batch, **_: Any) -> Outcome:
    counted = counted_labels(small, batch)
    total = int(counted.sum())
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    token_loss = torch.zeros(batch.labels.shape, dtype=dtype)
    logits: Tensor | None = None
    loss = torch.zeros((), dtype=dtype)
    _forget_gradients(model, batch)
    for b in range(len(batch.input_ids)):
        kept = batch.active[b].nonzero().flatten()
        if len(kept) == 0:
            continue
        inputs = {
            name: value[b : b + 1, kept]
            for name, value in batch.model_inputs().items()
            if name not in ("attention_mask", "position_ids")
        }
        inputs["attention_mask"] = torch.ones(1, len(kept), dtype=torch.long)
        with _numbered_as_in_original(model, small, batch, inputs, rows=b, columns=kept):
            rows = model(**inputs).logits[0]
        if logits is None:
            logits = rows.new_zeros(*batch.labels.shape, rows.shape[-1])
        logits[b, kept] = rows.detach()
        targets = counted[b].nonzero().flatten()
        predictors = targets - 1 if small.shifted else targets
        losses = F.cross_entropy(
            rows[torch.searchsorted(kept, predictors)].float(), batch.labels[b, targets], reduction="none"
        )
        token_loss[b, targets] = losses.detach()
        share = losses.sum() / max(total, 1)
        share.backward()
        loss = loss + share.detach()
    return Outcome(loss, token_loss, counted, _gradients(model, batch), logits)


def golden(
    model: nn.Module, small: SmallModel, batch: Batch, oracle: Oracle = run_key_masked, **loss_kwargs: Any
) -> Outcome:
    """An oracle in float64, including what the model itself asks to be done in float32."""
    precise = copy.deepcopy(model).double()
    for module in precise.modules():
        module.gradient_checkpointing = False  # recomputation in the backward pass would leave the mode below
    if hasattr(_base(precise), "set_experts_implementation"):
        _base(precise).set_experts_implementation("eager")  # the grouped kernel knows no float64
    if batch.inputs_embeds is not None:
        batch = replace(batch, inputs_embeds=batch.inputs_embeds.detach().double().requires_grad_())
    with torch.autocast("cpu", enabled=False), _AllInFloat64():
        return oracle(precise, small, batch, **loss_kwargs)


def observe(gated: nn.Module, batch: Batch, **loss_kwargs: Any) -> Outcome:
    """A step of the compiled model, forward and backward."""
    _forget_gradients(gated, batch)
    out = gated(**batch.model_inputs(), labels=batch.labels, token_mask=batch.token_mask, **loss_kwargs)
    out.loss.backward()
    return Outcome(
        loss=out.loss.detach(),
        token_loss=out.token_loss.detach(),
        counted=out.counted,
        gradients=_gradients(gated, batch),
        logits=None if out.logits is None else out.logits.detach(),
    )


def check_step(
    gated: nn.Module,
    model: nn.Module,
    small: SmallModel,
    batch: Batch,
    context: str = "",
    *,
    autocast: bool = False,
    with_logits: bool = False,
    **loss_kwargs: Any,
) -> Outcome:
    """Assert that a gated step is what oracle 2 says, within twice the error of the untouched model.

    That error is the larger one of two runs, on all tokens and on the active ones alone: a product with few
    rows is summed in another order than one with many.

    gated: `model` compiled; autocast: compute all but the golden run in bfloat16 where autocast would; with_logits:
    as in `compare`.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        seen = observe(gated, batch, **loss_kwargs)
        baseline = run_key_masked(model, small, batch, **loss_kwargs)
    reference = golden(model, small, batch, **loss_kwargs)
    if seen.token_loss.dtype != torch.float32:
        raise AssertionError(f"token_loss is {seen.token_loss.dtype}, not float32")
    comparison = compare(seen, baseline, reference, batch.active, with_logits=with_logits)
    if not comparison.ok:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            alone = _run_alone(model, small, batch)
        own = compare(alone, alone, golden(model, small, batch, _run_alone), batch.active)
        comparison = comparison.with_rounding_of(own)
    comparison.check(context)
    return seen


def embedding_stream_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[B, S, V]: final norm and head applied to what enters the first layer, as elided positions show it."""
    bare = copy.deepcopy(model).eval()
    depth = bare.config.num_hidden_layers
    lists = [module for module in bare.modules() if isinstance(module, nn.ModuleList)]
    stacks = [layers for layers in lists if len(layers) == depth]
    if len(stacks) != 1:
        raise ValueError(f"expected one stack of {depth} layers, found {len(stacks)}")
    del stacks[0][:]
    with torch.no_grad():
        return bare(**batch.model_inputs(), use_cache=False).logits


class NotApplicableError(Exception):
    """An oracle does not define the answer for this model; the message says why."""


def _step(
    model: nn.Module, small: SmallModel, batch: Batch, inputs: Mapping[str, Tensor], **loss_kwargs: Any
) -> Outcome:
    counted = counted_labels(small, batch)
    labels = batch.labels.masked_fill(~counted, NO_LABEL)
    _forget_gradients(model, batch)
    out = model(**inputs, labels=labels, **loss_kwargs)
    # A mean over nothing is NaN in the original; the meaning asked for is 0 with zero gradients.
    loss = out.loss if counted.any() else (out.logits * 0).sum()
    loss.backward()
    logits = out.logits.detach()
    return Outcome(
        loss.detach(), _token_losses(small, logits, labels), counted, _gradients(model, batch), logits
    )


def _token_losses(small: SmallModel, logits: Tensor, labels: Tensor) -> Tensor:
    rows, targets = (logits[:, :-1], labels[:, 1:]) if small.shifted else (logits, labels)
    wide = rows.double() if rows.dtype == torch.float64 else rows.float()
    losses = F.cross_entropy(wide.transpose(1, 2), targets, reduction="none", ignore_index=NO_LABEL)
    return F.pad(losses, (1, 0)) if small.shifted else losses


def _forget_gradients(model: nn.Module, batch: Batch) -> None:
    model.zero_grad(set_to_none=True)
    if batch.inputs_embeds is not None:
        batch.inputs_embeds.grad = None


def _gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    if batch.inputs_embeds is not None:
        found["inputs_embeds"] = batch.inputs_embeds.grad
    return {name: None if grad is None else grad.clone() for name, grad in found.items()}


def _base(model: nn.Module) -> nn.Module:
    unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _accepts(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(_base(model).forward).parameters


@contextmanager
def _numbered_as_in_original(
    model: nn.Module,
    small: SmallModel,
    batch: Batch,
    inputs: dict[str, Tensor],
    rows: int | slice = slice(None),
    columns: Tensor | slice = slice(None),
) -> Iterator[None]:
    """Make `inputs`, whose attention mask is not the original one, keep the original positions.

    rows, columns: the samples and positions of `batch` that `inputs` holds.
    """
    if _accepts(model, "position_ids"):
        positions = original_positions(small, batch)[rows][..., columns]
        inputs["position_ids"] = positions.view(-1, positions.shape[-1])
        yield
        return
    with ExitStack() as patches:
        for module in _base(model).modules():
            if hasattr(module, "build_alibi_tensor"):
                patches.enter_context(_alibi_from(module, batch.real.long(), rows, columns))
        yield


@contextmanager
def _alibi_from(module: Any, padding: Tensor, rows: int | slice, columns: Tensor | slice) -> Iterator[None]:
    """Let `module` compute its ALiBi biases from `padding` [B, S] instead of the mask it is given."""
    original = module.build_alibi_tensor

    def build(mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        B, S = padding.shape
        full = original(padding, num_heads, dtype).view(B, num_heads, 1, S)
        part = full[rows][..., columns]
        return part.reshape(-1, 1, part.shape[-1])

    with mock.patch.object(module, "build_alibi_tensor", build):
        yield


class _AllInFloat64(TorchFunctionMode):
    """Replaces every request for float32 by float64: norms, rotary tables, routers and losses ask for it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        widened = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return func(*(_widen(value) for value in args), **widened)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
