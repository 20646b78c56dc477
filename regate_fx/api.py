"""The two functions users call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import nn

from regate_fx.engine import GatedEngine
from regate_fx.errors import InvalidInput
from regate_fx.explain import explain
from regate_fx.gating import Gate
from regate_fx.inductor import Backend, chosen_backend
from regate_fx.ops.attention_kernels import Preferred, flash_attn_installed
from regate_fx.options import Options, Scope
from regate_fx.wrapper import ungated, wrap

__all__ = ["compile", "explain"]


def compile(
    model: nn.Module,
    *,
    backend: Backend = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    keep_logits: bool = False,
    validate: bool = True,
    reference: bool = False,
    gate: Gate | None = None,
    scope: Scope = "model",
    strict: bool = True,
    fused_loss: bool | None = None,
    bucket: int | None = None,
    attention: Preferred = "auto",
) -> Any:
    """Return `model` with one more argument, `token_mask`: the decoder computes only the positions it keeps.

    model:       any Hugging Face causal or vision-language model. It is shared, not copied.
    backend:     "inductor", "aot_eager", "eager", or a Dynamo backend of your own, for the rewritten graph.
    mode, options: Inductor's, as `torch.compile` takes them, for the rewritten graph. A mode with CUDA graphs records
                 one for every new number of samples, positions and active positions: give it a `bucket`.
    keep_logits: return logits [B, S, V] from calls with labels too, at the price of computing them.
    validate:    check the compiled graph against the untouched model and the dense reference at the first call
                 that could train the model; raises `ValidationFailed` there.
    reference:   compute the dense reference instead: every position, elided ones hidden from attention and held
                 constant through the layers. Slow; for finding out which of the two is wrong. Fills no `token_loss`.
    gate:        a `regate_fx.runtime.ReGate`. In training mode it chooses the mask of every batch, which then has to
                 carry `sample_id`, and takes in its losses; in evaluation the untouched model runs.
    scope:       "model" compiles the rewritten model as one graph; "layers" each decoder layer by itself, equal ones
                 once, with packed states handed from layer to layer: for deep models, and for FSDP2.
    strict:      False: where no layer can be gated, warn once and run the untouched model, on every position and every
                 label, in place of raising `NotGateable`. Its output has no `token_loss`, so that no gate can use it.
    fused_loss:  True: compute losses by chunks of rows, so that the logits of all active rows never exist, at the price
                 of computing logits twice; False: by the logits of all rows; None: True where those of the first batch
                 would take more than 1 GiB in float32. Heads whose logits are changed by more than a factor and a
                 soft-cap, or are read by anything but the loss, keep theirs.
    bucket:      round the number of rows that are computed, and the most of a sample, up to multiples of this, so that
                 few sizes serve all masks; the rows that fill it up belong to no sample and touch no result. The report
                 says what they cost. Refused where a model counts rows elsewhere than in its loss.
    attention:   what computes attention among the active positions, in each layer where it can; the report names what
                 does. "flash_attn", "torch" (`torch.nn.attention.varlen`) and "flex" (FlexAttention) on CUDA; "model":
                 the model's own operators, over all pairs of a sample's; "auto": the first of these that can, "torch"
                 before the others where `torch.nn.attention.activate_flash_attention_impl` put FlashAttention 3 or 4
                 in the place of torch's kernel.

    `gated(input_ids=..., labels=..., token_mask=mask)`, mask bool [B, S], returns an output with `loss` (mean over
    counted labels), `token_loss` float32 [B, S] and `counted` bool [B, S]. Without `token_mask` the untouched
    model runs. Capture happens at the first gated call; `NotGateable` is raised there if no layer can be gated.
    """
    original = ungated(model)
    if gate is not None and reference:
        raise InvalidInput(
            "reference", "is True together with a gate, which needs per-token losses.", "Drop one."
        )
    if scope not in ("model", "layers"):
        raise InvalidInput("scope", f"is {scope!r}.", "Use 'model' or 'layers'.")
    if gate is not None and not strict:
        raise InvalidInput(
            "strict",
            "is False together with a gate, which learns from the per-token losses of gated calls.",
            "Drop one; `regate_fx.explain` says beforehand whether a model can be gated.",
        )
    if bucket is not None and (isinstance(bucket, bool) or not isinstance(bucket, int) or bucket < 2):
        raise InvalidInput(
            "bucket", f"is {bucket!r}.", "Use None, or a number of rows from 2 on, such as 128."
        )
    _check_attention(attention)
    backend = chosen_backend(backend, mode, options)
    engine = GatedEngine(
        original,
        Options(backend, keep_logits, validate, reference, scope, strict, fused_loss, bucket, attention),
    )
    return wrap(original, engine, gate)


def _check_attention(attention: str) -> None:
    known = get_args(Preferred)
    if attention not in known:
        raise InvalidInput("attention", f"is {attention!r}.", f"Use one of {', '.join(map(repr, known))}.")
    if attention == "flash_attn" and not flash_attn_installed():
        raise InvalidInput(
            "attention", "is 'flash_attn', which is not installed.", "Install it, or use 'auto'."
        )
