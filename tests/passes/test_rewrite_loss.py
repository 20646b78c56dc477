"""The loss on active rows: the pairing of rows and labels is read from the graph, and what it cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captured import operators, run_until
from gating import assert_all_active_is_eager, gate, step
from small_decoder import (
    Loss,
    V,
    batch,
    decoder,
    in_float32,
    shifted_labels,
    shifted_logits,
    some_active,
    unshifted,
)
from torch import Tensor

from regate_fx.errors import NotGateable
from regate_fx.passes.base import Refused

LossCode = Callable[[Tensor, Tensor], Tensor]


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, V), labels.view(-1), reduction="sum") / 7


def rolled(logits: Tensor, labels: Tensor) -> Tensor:
    """The last row is paired with the first label."""
    return F.cross_entropy(logits.view(-1, V), labels.roll(-1, 1).view(-1))


def two_ahead(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-2].reshape(-1, V), labels[:, 2:].reshape(-1))


def joined(logits: Tensor, labels: Tensor) -> Tensor:
    filler = labels.new_full((labels.shape[0], 1), -100)
    return F.cross_entropy(logits.view(-1, V), torch.cat([labels[:, 1:], filler], 1).view(-1))


def rolled_and_overwritten(logits: Tensor, labels: Tensor) -> Tensor:
    moved = labels.roll(-1, 1)
    moved[:, -1] = -100
    return F.cross_entropy(logits.view(-1, V), moved.view(-1))


def masked_by_position(logits: Tensor, labels: Tensor) -> Tensor:
    """The first label has no row anyway."""
    labels = labels.masked_fill(torch.arange(labels.shape[1]) < 1, -100)
    return shifted_labels(logits, labels)


PAIRED: dict[str, tuple[LossCode, int]] = {
    "shifted labels": (shifted_labels, 1),
    "shifted logits": (shifted_logits, 1),
    "unshifted": (unshifted, 0),
    "in float32": (in_float32, 1),
    "sum over a number": (summed, 1),
    "two ahead": (two_ahead, 2),
    "labels joined with a filler": (joined, 1),
    "rolled, the last one overwritten": (rolled_and_overwritten, 1),
    "masked by position": (masked_by_position, 1),
}


def labelled() -> dict[str, Tensor]:
    inputs = batch(B=3, S=7)
    inputs["labels"][torch.rand(3, 7) < 0.3] = -100
    return inputs


@pytest.mark.parametrize("name", PAIRED)
def test_the_pairing_is_that_of_the_model(name: str) -> None:
    """token_loss, counted and loss by definition: label t belongs to row t - shift, counted where that is active."""
    code, shift = PAIRED[name]
    model = decoder(layers=1, loss=code)
    gated = gate(model)
    inputs, active = labelled(), some_active(3)
    loss, _, out = step(gated, **inputs, token_mask=active)

    labels = inputs["labels"]
    predictor = F.pad(active, (shift, 0))[:, : labels.shape[1]]
    counted = predictor & (labels != -100)
    logits = model(inputs["input_ids"], attention_mask=active.long()).logits.detach()
    moved = F.pad(logits, (0, 0, shift, 0))[:, : labels.shape[1]]
    expected = F.cross_entropy(moved.transpose(1, 2), labels.clamp(min=0), reduction="none") * counted
    assert torch.equal(out.counted, counted)
    assert out.token_loss.dtype == torch.float32
    torch.testing.assert_close(out.token_loss, expected, rtol=1e-4, atol=1e-5)
    divisor = 7 if code is summed else counted.sum()
    torch.testing.assert_close(loss, expected.sum() / divisor, rtol=1e-4, atol=1e-5)
    assert_all_active_is_eager(gated, model, inputs)


def test_a_rolled_label_is_reported_where_it_stands() -> None:
    model = decoder(layers=1, loss=rolled)
    inputs, active = batch(), some_active()
    out = gate(model)(**inputs, token_mask=active)
    assert torch.equal(out.counted, active.roll(1, 1))


def test_labels_that_the_model_puts_in_itself_are_not_reported() -> None:
    """The last row is trained to predict token 0, which is nobody's label."""

    def padded_with_a_token(logits: Tensor, labels: Tensor) -> Tensor:
        labels = F.pad(labels, (0, 1), value=0)[..., 1:].contiguous()
        return F.cross_entropy(logits.view(-1, V), labels.view(-1))

    model = decoder(layers=1, loss=padded_with_a_token)
    inputs = batch()
    active = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    try:
        out = gate(model)(**inputs, token_mask=active)
    except NotGateable:
        return
    assert not out.counted[:, 0].any()
    assert not out.token_loss[:, 0].any()


def test_another_ignore_index_is_obeyed() -> None:
    def ignoring(logits: Tensor, labels: Tensor) -> Tensor:
        labels = F.pad(labels, (0, 1), value=5)[..., 1:].contiguous()
        return F.cross_entropy(logits.view(-1, V), labels.view(-1), ignore_index=5)

    model = decoder(layers=1, loss=ignoring)
    gated = gate(model)
    inputs = batch()
    inputs["labels"][:, 1:4] = 5
    active = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    out = gated(**inputs, token_mask=active)
    assert torch.equal(out.counted[:, 1:], inputs["labels"][:, 1:] != 5)
    assert not out.counted[:, 0].any()
    assert_all_active_is_eager(gated, model, inputs)


def test_no_counted_label_is_a_loss_of_zero_with_zero_gradients() -> None:
    model = decoder()
    inputs = batch()
    inputs["labels"].fill_(-100)
    loss, gradients, out = step(gate(model), **inputs, token_mask=some_active())
    assert loss == 0
    assert gradients
    assert not any(gradient.any() for gradient in gradients.values())
    assert not out.counted.any()


def test_rows_and_operators() -> None:
    before = run_until(
        "place", Loss(decoder(layers=1, loss=shifted_labels)), batch(), some_active()
    ).graph_module
    run = run_until("remove_unused", Loss(decoder(layers=1, loss=shifted_labels)), batch(), some_active())
    old, new = operators(before), operators(run.graph_module)
    assert old["aten.cross_entropy_loss"] == new["aten.cross_entropy_loss"] == 1
    assert run.context.findings["loss"] is True
    rows = run.context.findings["plan"].rows.meta["val"].shape[0]
    loss = torch.ops.aten.cross_entropy_loss.default
    (node,) = run.graph_module.graph.find_nodes(op="call_function", target=loss)
    assert [str(size) for size in node.args[0].meta["val"].shape] == [str(rows), str(V)]
    assert new["aten.index_put"] == 2  # the two slots: token_loss and counted


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), labels.view(-1), label_smoothing=0.1)


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), labels.view(-1), weight=torch.ones(V))


def per_token(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), labels.view(-1), reduction="none").mean()


def changed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), torch.where(labels == 3, 4, labels).view(-1))


def masked_by_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), labels.masked_fill(~labels.bool(), -100).view(-1))


def chosen_by_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), torch.where(labels.bool(), labels, -100).view(-1))


def clamped(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), labels.clamp(min=1).view(-1))


def reordered(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(0, 1).reshape(-1, V), labels.transpose(0, 1).reshape(-1))


def class_first(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels)


def added_up(logits: Tensor, labels: Tensor) -> Tensor:
    return unshifted(logits, labels) + unshifted(logits * 2, labels)


def from_something_else(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), logits.argmax(-1).view(-1)) + 0 * labels.sum()


def by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, labels[..., None]).mean()


REFUSED: list[tuple[LossCode, str]] = [
    (smoothed, "smooths labels"),
    (weighted, "weights classes"),
    (per_token, "losses per token"),
    (changed, "aten.(eq|where) changes the labels"),
    (masked_by_labels, "changes the labels"),
    (chosen_by_labels, "aten.where changes the labels"),
    (clamped, "aten.clamp changes the labels"),
    (reordered, "unknown way|changes the labels"),
    (class_first, r"not \[tokens, vocabulary\]"),
    (added_up, "several cross-entropy losses"),
    (from_something_else, "something else than `labels`|over all positions"),
    (by_hand, "not a cross entropy"),
]


@pytest.mark.parametrize(("code", "message"), REFUSED, ids=[code.__name__ for code, _ in REFUSED])
def test_another_loss_is_refused_by_name(code: LossCode, message: str) -> None:
    with pytest.raises((NotGateable, Refused), match=message):
        gate(decoder(layers=1, loss=code))(**batch(), token_mask=some_active())
