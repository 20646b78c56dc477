"""Dropout of a gated step: as in the untouched model, drawn for every active token, and recomputed alike.

Shapes: B samples, S positions, R draws, Q observed quantities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import counted_labels, embedding_stream_logits, observe, run_key_masked
from small_models import MODELS, Batch, build, random_batch
from tiers import exhaustive
from torch import Tensor, nn

import regate_fx

TWINS = 16
RUNS = 60
# In standard errors; among the few hundred quantities compared here, chance exceeds it once in 10,000 suites.
SIGNIFICANT = 5.0

CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"resid_pdrop": 0.4}),
    ("opt", {"dropout": 0.4}),
    ("gpt_neox", {"hidden_dropout": 0.4}),
    ("llama", {"attention_dropout": 0.4}),
    ("gpt2", {"attn_pdrop": 0.4}),
    ("gemma2", {"attention_dropout": 0.4}),
]
# Dropout on the residual branch, in attention by a kernel, and in attention written by hand.
by_case = pytest.mark.parametrize(
    ("name", "rates"),
    [
        pytest.param(
            name, rates, id=f"{name}-{next(iter(rates))}", marks=() if place in (0, 3, 5) else exhaustive
        )
        for place, (name, rates) in enumerate(CASES)
    ],
)


def twin_batch(generator: torch.Generator) -> Batch:
    """Samples alike in everything, with a label at every position; two of them make a pair of twins."""
    one = random_batch(generator, 1, 9, padding=None, share=0.6, holes=0.0)
    ids, labels, token_mask = (
        tensor.expand(2 * TWINS, -1).clone() for tensor in (one.input_ids, one.labels, one.token_mask)
    )
    return Batch(ids, torch.ones_like(ids), labels, token_mask)


def draws(token_loss: Callable[[], Tensor], counted: Tensor) -> Tensor:
    """[R, Q]: the losses of a pair of twins, R = RUNS * TWINS times, each with dropout of its own."""
    torch.manual_seed(3)
    runs = [token_loss()[counted].detach().double().view(TWINS, -1) for _ in range(RUNS)]
    return torch.cat(runs)


@by_case
def test_losses_are_distributed_as_in_the_untouched_model(
    name: str, rates: dict[str, Any], generator: torch.Generator
) -> None:
    model, small = build(name, **rates), MODELS[name]
    gated = regate_fx.compile(model, backend="eager", validate=False)
    batch = twin_batch(generator)
    counted = counted_labels(small, batch)
    seen = draws(lambda: gated_forward(gated, batch).token_loss, counted)
    expected = draws(lambda: run_key_masked(model, small, batch).token_loss, counted)

    assert (expected.std(0) > 1e-3).any()
    assert largest_z(seen, expected) < SIGNIFICANT, "means differ"
    # Covariances between tokens and between twins: one draw shared by several would show in them.
    assert largest_z(centred_products(seen), centred_products(expected)) < SIGNIFICANT, "covariances differ"


def gated_forward(gated: nn.Module, batch: Batch) -> Any:
    return gated(**batch.model_inputs(), labels=batch.labels, token_mask=batch.token_mask)


def centred_products(values: Tensor) -> Tensor:
    """[R, Q] -> [R, Q * (Q + 1) / 2]: the mean over R is the covariance of each pair of quantities."""
    centred = values - values.mean(0)
    one, other = torch.triu_indices(values.shape[1], values.shape[1])
    return centred[:, one] * centred[:, other]


def largest_z(one: Tensor, other: Tensor) -> float:
    """The largest difference of the means of two [R, Q], in standard errors; rounding counts as none."""
    standard_error = ((one.var(0) + other.var(0)) / len(one)).sqrt()
    difference = (one.mean(0) - other.mean(0)).abs()
    rounding = 1e-5 * (1 + other.mean(0).abs())
    return float(torch.where(difference < rounding, 0.0, difference / standard_error).max())


@pytest.mark.parametrize("wrong", ["rate", "shared by tokens", "shared by twins", "none"])
def test_the_statistics_notice_wrong_dropout(wrong: str) -> None:
    torch.manual_seed(0)
    R, tokens = TWINS * RUNS, 5

    def dropped(p: float, *shape: int) -> Tensor:
        return (torch.rand(R, *shape) >= p).double() / (1 - p)

    expected = dropped(0.4, 2, tokens).flatten(1)
    seen = {
        "rate": lambda: dropped(0.3, 2, tokens),
        "shared by tokens": lambda: dropped(0.4, 2, 1).expand(R, 2, tokens),
        "shared by twins": lambda: dropped(0.4, 1, tokens).expand(R, 2, tokens),
        "none": lambda: torch.ones(R, 2, tokens).double(),
    }[wrong]().flatten(1)
    assert largest_z(expected, dropped(0.4, 2, tokens).flatten(1)) < SIGNIFICANT
    assert largest_z(centred_products(seen), centred_products(expected)) > SIGNIFICANT


def test_elided_positions_pass_no_dropout(generator: torch.Generator) -> None:
    model = build("gpt2", resid_pdrop=0.5, attn_pdrop=0.5)
    gated = regate_fx.compile(model, backend="eager", validate=False)
    batch = random_batch(generator, 3, 11, padding="right")
    with torch.no_grad():
        logits = gated(**batch.model_inputs(), token_mask=batch.token_mask).logits
    elided = batch.real & ~batch.active
    torch.testing.assert_close(
        logits[elided], embedding_stream_logits(model, batch)[elided], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    [
        pytest.param("eager", False, id="eager-kept", marks=exhaustive),
        pytest.param("aot_eager", True, id="aot_eager-recomputed"),
    ],
)
@by_case
def test_the_gradient_belongs_to_the_loss(
    name: str, rates: dict[str, Any], backend: str, checkpointing: bool, generator: torch.Generator
) -> None:
    """A backward pass that drew other dropout than the forward pass would not give the loss's own slope."""
    model = build(name, **rates)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gated = regate_fx.compile(model, backend=backend, validate=False)
    batch = random_batch(generator, 3, 9, share=0.6, holes=0.0)
    observe(gated, batch)  # whatever the first call draws is behind us

    torch.manual_seed(7)
    outcome = observe(gated, batch)
    gradients = {key: grad for key, grad in outcome.gradients.items() if grad is not None}
    steepness = float(torch.stack([grad.norm() for grad in gradients.values()]).norm())
    parameters = dict(gated.named_parameters())
    losses = []
    for step in (0.01, -0.01):
        with torch.no_grad():
            for key, grad in gradients.items():
                parameters[key].add_(grad, alpha=step / steepness)
        torch.manual_seed(7)
        losses.append(float(gated_forward(gated, batch).loss.detach()))
        with torch.no_grad():
            for key, grad in gradients.items():
                parameters[key].sub_(grad, alpha=step / steepness)
    slope = (losses[0] - losses[1]) / 0.02
    assert slope == pytest.approx(steepness, rel=0.02)
