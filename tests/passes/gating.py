"""What must hold for every gated decoder, whatever its layers do.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from typing import Any

import torch
from small_decoder import V
from torch import Tensor, nn

import regate_fx
from regate_fx.errors import NotGateable


def gate(model: nn.Module, backend: str = "eager", **options: Any) -> Any:
    """Validation is off: what it would catch is what these tests are to catch by themselves."""
    return regate_fx.compile(model, backend=backend, validate=False, **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Loss, gradients and the output of one call."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    return out.loss.detach(), gradients(model), out


def assert_same_step(seen: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    """Loss, the set of gradients and their values."""
    torch.testing.assert_close(seen[0], wanted[0], rtol=2e-5, atol=1e-6)
    assert seen[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        torch.testing.assert_close(
            seen[1][name], grad, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_all_active_is_eager(gated: Any, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    seed = torch.random.get_rng_state()
    seen = step(gated, **inputs, token_mask=mask)
    torch.random.set_rng_state(seed)
    assert_same_step(seen, step(model, **inputs))


def assert_is_key_masked(gated: Any, model: nn.Module, inputs: dict[str, Tensor], token_mask: Tensor) -> None:
    """Oracle 2: the full run in which nobody sees an elided key. Positions are those of the tensor index."""
    active = token_mask & inputs.get("attention_mask", torch.ones_like(token_mask)).bool()
    counted = torch.zeros_like(active)
    counted[:, 1:] = active[:, :-1]
    counted &= inputs["labels"] != -100
    masked = dict(inputs, attention_mask=active.long(), labels=inputs["labels"].masked_fill(~counted, -100))
    seen = step(gated, **inputs, token_mask=token_mask)
    assert torch.equal(seen[2].counted, counted)
    assert_same_step(seen, step(model, **masked))


def assert_elided_ids_do_not_matter(gated: Any, inputs: dict[str, Tensor], token_mask: Tensor) -> None:
    """Not by a bit."""
    other = dict(
        inputs, input_ids=torch.where(token_mask, inputs["input_ids"], (inputs["input_ids"] + 5) % V)
    )
    before, after = (gated(**given, token_mask=token_mask) for given in (inputs, other))
    assert torch.equal(before.token_loss, after.token_loss)


def refusal_of(gated: Any, model: nn.Module, inputs: dict[str, Tensor]) -> str | None:
    """Why nothing is gated, or None once all positions active were seen to compute what eager does."""
    try:
        assert_all_active_is_eager(gated, model, inputs)
    except NotGateable as refused:
        return str(refused)
    return None


def why_dense(gated: Any, model: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    """Why layers are dense, or the one refusal; all positions active is eager in any case."""
    refusal = refusal_of(gated, model, inputs)
    return [refusal] if refusal else [layer.reason for layer in gated.report.layers if layer.kind == "dense"]
