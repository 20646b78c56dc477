"""The auxiliary loss of a router is that of a batch which holds only the active tokens.

Shapes: B samples, S positions, L the most active positions of a sample.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import NO_LABEL, _forget_gradients, _gradients
from small_models import Batch, build, random_batch
from tiers import tiers
from torch import Tensor, nn

import regate_fx

WEIGHT = 0.3


def only_active(batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a batch [B, L] without the tokens that are elided, and the label [B, L] that each row predicts."""
    B = len(batch.input_ids)
    L = int(batch.active.sum(1).max())
    inputs = {
        name: torch.zeros(B, L, dtype=torch.long) for name in ("input_ids", "attention_mask", "position_ids")
    }
    targets = torch.full((B, L), NO_LABEL)
    following = F.pad(batch.labels, (0, 1), value=NO_LABEL)
    for sample in range(B):
        kept = batch.active[sample].nonzero().flatten()
        inputs["input_ids"][sample, : len(kept)] = batch.input_ids[sample, kept]
        inputs["attention_mask"][sample, : len(kept)] = 1
        inputs["position_ids"][sample, : len(kept)] = kept
        targets[sample, : len(kept)] = following[sample, kept + 1]
    return inputs, targets


def step(
    model: nn.Module, inputs: dict[str, Tensor], targets: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, Any]:
    """Loss, auxiliary loss and gradients of the untouched model."""
    _forget_gradients(model, batch)
    counted = inputs["attention_mask"] != 0
    # It computes an auxiliary loss where it is given labels; those of our own rows are not shifted.
    out = model(**inputs, labels=torch.where(counted, inputs["input_ids"], NO_LABEL))
    loss = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), ignore_index=NO_LABEL)
    loss = loss + WEIGHT * out.aux_loss
    loss.backward()
    return loss.detach(), out.aux_loss.detach(), _gradients(model, batch)


@pytest.mark.parametrize("numbered", [False, True], ids=["padding_mask", "position_ids"])
@pytest.mark.parametrize("name", tiers(["mixtral", "qwen2_moe"], "mixtral"))
def test_it_is_over_the_active_tokens(name: str, numbered: bool, generator: torch.Generator) -> None:
    model = build(name, output_router_logits=True, router_aux_loss_coef=WEIGHT)
    gated = regate_fx.compile(model, backend="eager")
    for B, S in ((3, 11), (2, 17)):
        batch = random_batch(generator, B, S, padding=None if numbered else "right")
        inputs = batch.model_inputs()
        if numbered:
            # Without a mask the model divides by the number of positions.
            inputs = {"input_ids": batch.input_ids, "position_ids": torch.arange(S).expand(B, S)}
        _forget_gradients(model, batch)
        out = gated(**inputs, labels=batch.labels, token_mask=batch.token_mask)
        out.loss.backward()
        gradients = _gradients(model, batch)
        loss, aux_loss, wanted = step(model, *only_active(batch), batch)
        torch.testing.assert_close(out.loss.detach(), loss)
        torch.testing.assert_close(out.aux_loss.detach(), aux_loss)
        assert gradients.keys() == wanted.keys()
        for parameter, gradient in wanted.items():
            torch.testing.assert_close(gradients[parameter], gradient, atol=2e-5, rtol=1e-4, msg=parameter)
    assert gated.report.validation.startswith("validated against the untouched model and the dense reference")
