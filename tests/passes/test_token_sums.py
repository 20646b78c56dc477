"""What a model sums over tokens beside its loss is summed over the active ones, or the model is refused.

Shapes: B samples, S positions, D hidden size, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_decoder import Block, D, V, causal_mask
from tiers import tiers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import regate_fx
from regate_fx.errors import NotGateable

B, S, E = 3, 7, 4
IGNORED = -100


@dataclass
class Seen:
    """What an extra loss is made from. mixed, gated: what routers are given, of a layer that runs dense and of one that
    is gated; real: padding mask [B, S]; targets: of each row, [B, S]; loss: the cross entropy."""

    mixed: Tensor
    gated: Tensor
    final: Tensor
    logits: Tensor
    real: Tensor
    labels: Tensor
    targets: Tensor
    table: Tensor
    weights: Tensor
    loss: Tensor

    def of(self, active: Tensor) -> Seen:
        """The same of the active tokens alone, as one sample: [1, N]."""
        rows = {
            name: value[active][None] for name, value in vars(self).items() if value.shape[:2] == active.shape
        }
        return Seen(**vars(self) | rows)


Extra = Callable[[Seen], Tensor]


class Routed(nn.Module):
    """Two layers, the first of which may mix tokens; `extra` makes the loss of what they are."""

    def __init__(self, extra: Extra, mixes: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.layers = nn.ModuleList([Block(running_mean if mixes else None), Block()])
        self.table, self.weights = nn.Parameter(torch.randn(16, D)), nn.Parameter(torch.randn(E))
        self.extra, self.active = extra, None
        self.first_gated = 1 if mixes else 0

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> CausalLMOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x, states = self.embed(input_ids), []
        for number, layer in enumerate(self.layers):
            held = self.active if number >= self.first_gated else None
            after = layer(x, causal_mask(mask if held is None else mask * held, input_ids.shape[1]))
            x = after if held is None else torch.where(held[..., None], after, x.detach())
            states.append(x)
        logits = self.head(x)
        if labels is None:
            return CausalLMOutput(logits=logits)
        targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
        if self.active is not None:
            targets = targets.masked_fill(~self.active, IGNORED)
        loss = F.cross_entropy(logits.view(-1, V), targets.view(-1), ignore_index=IGNORED)
        seen = Seen(
            *states, x, logits, mask, labels, targets, self.table[: input_ids.shape[1]], self.weights, loss
        )
        return CausalLMOutput(
            loss=self.extra(seen if self.active is None else seen.of(self.active)), logits=logits
        )


def running_mean(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def batch(padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (B, S), generator=generator)
    real = torch.arange(S) < (torch.tensor([[S], [4], [5]]) if padded else S)
    active = torch.rand(B, S, generator=generator) < 0.6
    labels = ids.masked_fill(~real | (torch.rand(B, S, generator=generator) < 0.3), IGNORED)
    given = {"input_ids": ids, "labels": labels, "token_mask": active}
    return given | ({"attention_mask": real.long()} if padded else {})


def step(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def sharp(x: Tensor) -> Tensor:
    return x.logsumexp(-1).square()


def chosen(x: Tensor) -> Tensor:
    return x[..., :E].argmax(-1)


def counts(x: Tensor) -> Tensor:
    return F.one_hot(chosen(x), E).sum((0, 1))


def by_adding(s: Seen) -> Tensor:
    """Mixtral's: how often each expert is chosen, padding left out."""
    weights = s.real.reshape(-1).to(s.gated.dtype)
    ids = chosen(s.gated).reshape(-1)
    added = torch.zeros(E, dtype=weights.dtype).scatter_add(
        0, ids.repeat_interleave(2), weights.repeat_interleave(2)
    )
    shares = (s.gated[..., :E].softmax(-1) * s.real[..., None]).sum((0, 1))
    return (added / s.real.sum() * shares / s.real.sum()).sum()


def summed(x: Tensor) -> int:
    return x.shape[0] * x.shape[1]


class TakenForItsGradient(torch.autograd.Function):
    """DeepSeek's way to add a loss: the states pass, and in the backward the loss has a gradient of one."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, loss: Tensor) -> Tensor:
        return states.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, torch.ones((), dtype=gradient.dtype)


OVER_ACTIVE: dict[str, Extra] = {
    "mean": lambda s: s.loss + sharp(s.gated).mean(),
    "mean_of_a_dense_layer": lambda s: s.loss + sharp(s.mixed).mean(),
    "mean_over_features_too": lambda s: s.loss + s.gated.square().mean() - s.gated.mean().square(),
    "over_padding_mask": lambda s: s.loss + (sharp(s.gated) * s.real).sum() / s.real.sum(),
    "over_padding_mask_of_all_layers": lambda s: (
        s.loss
        + sum((sharp(x) * s.real).sum() for x in (s.mixed, s.gated)) / (0.0 + s.real.sum() + s.real.sum())
    ),
    "over_clamped_padding_mask": lambda s: (
        s.loss + (sharp(s.gated) * s.real).sum() / s.real.sum().clamp(min=1)
    ),
    "over_positions": lambda s: s.loss + sharp(s.gated).sum() / summed(s.gated),
    "of_the_logits": lambda s: s.loss + sharp(s.logits).mean(),
    "added_by_expert": lambda s: s.loss + by_adding(s),
    "counted_by_expert": lambda s: s.loss + (counts(s.gated) / summed(s.gated) * s.weights).sum(),
    "counted_in_a_dense_layer": lambda s: s.loss + (counts(s.mixed) / summed(s.gated) * s.weights).sum(),
    "shares_times_counts": lambda s: (
        s.loss + (counts(s.gated) / summed(s.gated) * s.gated[..., :E].softmax(-1).mean((0, 1))).sum()
    ),
}


REFUSED: dict[str, tuple[str, Extra]] = {
    "number_of_labels": ("mixed-sums", lambda s: total(s) / (s.targets != IGNORED).sum()),
    "number_of_labels_by_sample": ("mixed-sums", lambda s: total(s) / (s.targets != IGNORED).sum(1).sum()),
    "number_of_labels_counted": (
        "mixed-sums",
        lambda s: total(s) / torch.count_nonzero(s.targets != IGNORED),
    ),
    "loss_by_positions": ("mixed-sums", lambda s: total(s) / torch.full((), summed(s.gated))),
    "loss_by_padding_mask": ("mixed-sums", lambda s: total(s) / s.real.sum()),
    "labelled_weights": (
        "mixed-sums",
        lambda s: (sharp(s.gated) * shares(s.labels != IGNORED)).sum() + s.loss,
    ),
    "padding_by_sample": ("mixed-sums", lambda s: s.loss + sharp(s.gated).sum() / s.real.sum(1).sum()),
    "padding_counted": ("mixed-sums", lambda s: s.loss + sharp(s.gated).sum() / torch.count_nonzero(s.real)),
    "padding_weights": ("mixed-sums", lambda s: s.loss + (sharp(s.gated) * shares(s.real)).sum()),
    "part_of_padding": ("mixed-sums", lambda s: s.loss + sharp(s.gated).sum() / s.real[:, 1:].sum()),
    "longest_sample": ("mixed-sums", lambda s: s.loss + sharp(s.gated).sum() / s.real.sum(1).amax()),
    "positions_in_a_tensor": (
        "mixed-sums",
        lambda s: s.loss + sharp(s.gated).sum() / torch.full((), summed(s.gated)),
    ),
    "weights_of_positions": ("mixed-sums", lambda s: s.loss + sharp(s.gated).sum() / s.table.square().sum()),
    "penalty_on_positions": ("mixed-sums", lambda s: s.loss + s.table.square().sum()),
    "padding_added": (
        "mixed-sums",
        lambda s: s.loss + sharp(s.gated).mean() + s.real.sum() * s.weights.sum(),
    ),
    "divided_before_it_is_summed": (
        "mixed-sums",
        lambda s: s.loss + (sharp(s.mixed) / summed(s.mixed)).sum(),
    ),
    "mean_by_sample": ("mixed-sums", lambda s: s.loss + sharp(s.gated).mean(1).mean()),
    "rows_cut_off": ("mixed-sums", lambda s: s.loss + sharp(s.gated[:, :-1]).mean()),
    "logits_cut_off": ("mixed-sums", lambda s: s.loss + sharp(s.logits[:, :-1]).mean()),
    "variance": ("mixed-sums", lambda s: s.loss + s.gated.var()),
    "gram": ("mixed-sums", lambda s: s.loss + torch.einsum("bsd,bse->de", s.gated, s.gated).sum()),
    "variance_alone": ("mixes-tokens", lambda s: (s.gated.var() * s.weights).sum()),
    "mean_read_by_an_unknown_operator": (
        "token-sum",
        lambda s: added_at(s.gated.mean((0, 1))[:2]).square().sum(),
    ),
}


def total(s: Seen) -> Tensor:
    return F.cross_entropy(s.logits.view(-1, V), s.targets.view(-1), ignore_index=IGNORED, reduction="sum")


def added_at(values: Tensor) -> Tensor:
    return torch.zeros(2, dtype=values.dtype).index_add(0, torch.tensor([1, 0]), values)


def shares(flags: Tensor) -> Tensor:
    return flags / flags.sum()


SUMS = [(name, keep_logits) for name in OVER_ACTIVE for keep_logits in (False, True)]
WITHOUT_LOGITS = [(name, False) for name in OVER_ACTIVE]


@pytest.mark.parametrize(
    "case", tiers(SUMS, *WITHOUT_LOGITS, ("mean", True), ("mean_of_a_dense_layer", True))
)
def test_sums_are_over_the_active_tokens(case: tuple[str, bool]) -> None:
    name, keep_logits = case
    mixes = "dense" in name or "all_layers" in name
    model = Routed(OVER_ACTIVE[name], mixes).double()
    gated = regate_fx.compile(model, backend="eager", keep_logits=keep_logits, validate=False)
    reference = regate_fx.compile(model, backend="eager", validate=False, reference=True)
    given = batch(padded=True)
    found = {"gated": step(gated, given), "reference": step(reference, given)}
    assert [layer.kind for layer in gated.report.layers] == ["dense" if mixes else "varlen", "varlen"]
    model.active = given.pop("token_mask") & given["attention_mask"].bool()
    loss, gradients = step(model, given)
    for way, (its_loss, its_gradients) in found.items():
        torch.testing.assert_close(its_loss, loss, msg=way)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(its_gradients[parameter], gradient, msg=f"{way}, {parameter}")


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_be_over_all_positions_is_refused(name: str) -> None:
    code, extra = REFUSED[name]
    gated = regate_fx.compile(Routed(extra, mixes="mixed" in name).double(), backend="eager", validate=False)
    with pytest.raises(NotGateable) as refused:
        step(gated, batch(padded=False))
    assert code in {refusal.code for refusal in refused.value.refusals}, refused.value


def test_a_loss_that_is_taken_for_its_gradient_is_over_the_active_tokens() -> None:
    class Passing(Routed):
        def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:  # type: ignore[override]
            x = self.embed(input_ids)
            for layer in self.layers:
                after = layer(
                    x, None if self.active is None else causal_mask(self.active, input_ids.shape[1])
                )
                x = after if self.active is None else torch.where(self.active[..., None], after, x.detach())
                extra = sharp(x).mean() if self.active is None else sharp(x)[self.active].mean()
                x = TakenForItsGradient.apply(x, extra)
            targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
            if self.active is not None:
                targets = targets.masked_fill(~self.active, IGNORED)
            return CausalLMOutput(
                loss=F.cross_entropy(self.head(x).view(-1, V), targets.view(-1), ignore_index=IGNORED)
            )

    model = Passing(OVER_ACTIVE["mean"], mixes=False).double()
    gated = regate_fx.compile(model, backend="eager")
    given = batch(padded=False)
    found = step(gated, given)
    assert [layer.kind for layer in gated.report.layers] == ["varlen", "varlen"]
    assert gated.report.validation == "validated against the untouched model and the dense reference"
    model.active = given.pop("token_mask")
    loss, gradients = step(model, given)
    torch.testing.assert_close(found[0], loss)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(found[1][parameter], gradient, msg=parameter)


def test_a_mean_that_takes_in_padding_is_validated_where_there_is_none() -> None:
    gated = regate_fx.compile(Routed(OVER_ACTIVE["mean"], mixes=False), backend="eager")
    step(gated, batch(padded=True))
    assert gated.report.validation.startswith(
        "validated against the dense reference and, where no sample has padding, the untouched model"
    )
    other = regate_fx.compile(Routed(OVER_ACTIVE["over_padding_mask"], mixes=False), backend="eager")
    step(other, batch(padded=True))
    assert other.report.validation == "validated against the untouched model and the dense reference"
