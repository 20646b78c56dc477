"""Which values are packed, compact or dense; where packed states are scattered; what escapes its layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import run_until
from gating import assert_all_active_is_eager, gate, step
from small_decoder import Block, D, Decoder, Loss, batch, some_active
from torch import Tensor, nn

from regate_fx.passes.base import is_tensor, operator_name
from regate_fx.passes.layers import DecoderStack
from regate_fx.passes.layouts import Layout
from regate_fx.passes.pipeline import PipelineRun
from regate_fx.passes.placement import Placement

Arrange = Callable[..., Tensor]


class Mixes(Block):
    """Tokens mix outside attention."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attend(self.attention_norm(x), mask)
        return x + self.down(F.gelu(self.up(self.norm(x).cumsum(1))))


class MixesOnceMore(Block):
    """As `Mixes`, in an addition of its own."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = super().forward(x, mask)
        return x + self.norm(x).cumsum(1)


class Bent(Block):
    """Attention with operators of its own over pairs."""

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        S = x.shape[1]
        seen = torch.arange(S)[:, None] >= torch.arange(S)
        scores = torch.sin(self.q(x) @ self.k(x).mT).masked_fill(~seen, torch.finfo(x.dtype).min)
        return self.o(scores.softmax(-1) @ self.v(x))


def place(*blocks: nn.Module, logits: bool = False) -> tuple[PipelineRun, DecoderStack, Placement]:
    run = run_until("place", Loss(Decoder(blocks), logits), batch(), some_active())
    return run, run.context.findings["layers"], run.context.findings["placement"]


def layouts_of(name: str, run: PipelineRun, placement: Placement) -> list[Layout]:
    nodes = [n for n in run.graph_module.graph.nodes if n.op == "call_function" and operator_name(n) == name]
    return [placement.layout(node) for node in nodes]


def test_everything_from_the_embeddings_to_the_loss_is_packed() -> None:
    run, stack, placement = place(Block(), Block())

    # All that is computed from the token rows, each a tensor, and nothing else.
    rows = {next(node for node in run.graph_module.graph.nodes if operator_name(node) == "aten.embedding")}
    for node in run.graph_module.graph.nodes:
        if node.op == "call_function" and rows.intersection(node.all_input_nodes) and is_tensor(node):
            rows.add(node)
    assert run.rewrites["place"] == len(rows) > 40
    assert placement.layouts.keys() == rows
    assert set(placement.layouts.values()) == {Layout.PACKED}
    assert not placement.scatter_base
    for name in ("aten.linear", "aten.layer_norm", "aten.gelu", "aten.cross_entropy_loss"):
        assert set(layouts_of(name, run, placement)) == {Layout.PACKED}
    # Token rows are packed; rows of learned positions have no sample and are gathered where they enter.
    assert layouts_of("aten.embedding", run, placement) == [Layout.PACKED, Layout.DENSE]
    assert all(layer.refused is None for layer in stack.layers)


def test_pairs_of_positions_are_compact_and_what_surrounds_them_packed() -> None:
    run, _, placement = place(Bent(), Bent())
    assert layouts_of("aten.softmax", run, placement) == [Layout.COMPACT] * 2
    assert set(layouts_of("aten.linear", run, placement)) == {Layout.PACKED}


def test_a_layer_that_mixes_tokens_is_dense_and_named() -> None:
    run, stack, placement = place(Block(), Mixes(), Block())

    assert [layer.refused is None for layer in stack.layers] == [True, False, True]
    (refusal,) = [refusal for refusal in run.refusals if refusal.layer is not None]
    assert (refusal.layer, refusal.code) == (1, "mixes-tokens")
    assert "aten.cumsum" in refusal.reason
    assert "test_placement.py" in refusal.source
    # What enters the dense layer is scattered onto what entered the gated one before it.
    assert placement.scatter_base == {stack.layers[1].start: stack.layers[0].start}
    attentions = layouts_of("aten.scaled_dot_product_attention", run, placement)
    assert attentions == [Layout.PACKED, Layout.DENSE, Layout.PACKED]


def test_gated_layers_in_a_row_share_one_scatter() -> None:
    _, stack, placement = place(Block(), Block(), Mixes(), Block(), Mixes())
    layers = stack.layers
    assert placement.scatter_base == {layers[2].start: layers[0].start, layers[4].start: layers[3].start}


def test_logits_for_every_position_scatter_what_leaves_the_last_layer() -> None:
    run, stack, placement = place(Block(), Block(), logits=True)
    assert placement.scatter_base == {stack.last_stream: stack.layers[0].start}
    *_, head = layouts_of("aten.linear", run, placement)
    assert head is Layout.DENSE
    assert layouts_of("aten.cross_entropy_loss", run, placement) == [Layout.PACKED]


def test_nothing_is_packed_where_every_layer_mixes() -> None:
    run, stack, placement = place(Mixes(), Mixes())
    assert all(layer.refused is not None for layer in stack.layers)
    assert not placement.scatter_base
    assert len([refusal for refusal in run.refusals if refusal.layer is not None]) == 2


class Remembers(Decoder):
    """The second layer reads what the first computed inside: a value behind the residual stream's back."""

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Tensor) -> Any:
        first, second = self.layers
        x = self.embedding(input_ids)
        values = first.v(first.norm(x))
        x = first(x)
        x = second(x) + second.norm(x) * values
        return self.loss(self.head(self.final_norm(x)), labels)


def test_layers_that_share_a_value_behind_the_streams_back_are_one() -> None:
    run = run_until("place", Remembers([Block(), Block()]), batch(), some_active())
    (layer,) = run.context.findings["layers"].layers
    assert len(layer.attentions) == 2
    assert layer.refused is None
    assert set(run.context.findings["placement"].layouts.values()) == {Layout.PACKED}


class ShowsStates(Decoder):
    """Besides the loss, states from inside the first layer are returned: every position of them."""

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Tensor) -> Any:
        first, second = self.layers
        x = self.embedding(input_ids)
        inside = x + first.attend(first.attention_norm(x), None)
        x = inside + first.down(F.gelu(first.up(first.norm(inside))))
        return self.loss(self.head(self.final_norm(second(x))), labels), inside


def test_a_layer_whose_inner_states_are_wanted_everywhere_is_dense_and_named() -> None:
    run = run_until("place", ShowsStates([Block(), Block()]), batch(), some_active())
    (refusal,) = [refusal for refusal in run.refusals if refusal.layer is not None]
    assert (refusal.layer, refusal.code) == (0, "escapes")
    assert "every position" in refusal.reason
    assert [layer.refused is None for layer in run.context.findings["layers"].layers] == [False, True]


def test_dense_layers_among_gated_ones_compute_what_eager_does() -> None:
    torch.manual_seed(1)
    model = Decoder([Block(), Mixes(), Block(), Bent()])
    gated = gate(model)
    assert_all_active_is_eager(gated, model, batch())
    assert [layer.kind for layer in gated.report.layers] == ["varlen", "dense", "varlen", "compact"]


@pytest.mark.parametrize("mixing", [Mixes, MixesOnceMore])
def test_a_dense_layer_sees_the_states_that_elided_positions_had_before_the_gated_ones(
    mixing: type[Block],
) -> None:
    """Against the meaning written out by hand: `h'[b, s] = h[b, s]` at elided positions, as a constant."""
    torch.manual_seed(1)
    first, second = Block(), mixing()
    model = Decoder([first, second])
    inputs, active = batch(), some_active()

    class ByHand(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            S = x.shape[1]
            seen = (torch.arange(S)[:, None] >= torch.arange(S)) & active[:, None, None, :]
            return torch.where(active[..., None], first(x, seen), x.detach())

    reference = Decoder([ByHand(), second])
    for name in ("embedding", "positions", "final_norm", "head"):
        setattr(reference, name, getattr(model, name))
    counted = F.pad(active[:, :-1], (1, 0))
    labels = inputs["labels"].masked_fill(~counted, -100)
    wanted = reference(inputs["input_ids"], labels=labels).loss
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    seen = gate(model)(**inputs, token_mask=active).loss
    seen.backward()
    torch.testing.assert_close(seen, wanted)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


ARRANGED: dict[str, tuple[Arrange, Arrange]] = {
    "flat": (lambda x: x.reshape(-1, D), lambda x, B: x.view(B, -1, D)),
    "sequence first": (lambda x: x.transpose(0, 1), lambda x, B: x.transpose(0, 1)),
}


class Arranged(nn.Module):
    """A block that hands on its states in another form, or takes them in it."""

    def __init__(self, block: Block, before: Arrange | None = None, after: Arrange | None = None) -> None:
        super().__init__()
        self.block, self.before, self.after = block, before, after

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.block(x if self.before is None else self.before(x, mask.shape[0]), mask)
        return x if self.after is None else self.after(x)


@pytest.mark.parametrize("form", ARRANGED)
def test_states_may_leave_the_gated_layers_in_another_form_than_they_came_in(form: str) -> None:
    """Elided positions show what came in, brought into that form."""
    torch.manual_seed(1)
    blocks = [Block(), Mixes()]
    there, back = ARRANGED[form]
    plain = Decoder(blocks)
    arranged = Decoder([Arranged(blocks[0], after=there), Arranged(blocks[1], before=back)])
    for name in ("embedding", "positions", "final_norm", "head"):
        setattr(arranged, name, getattr(plain, name))
    inputs, active = batch(3, padded=True), some_active(3)
    gated = gate(arranged)
    seen, wanted = (step(model, **inputs, token_mask=active) for model in (gated, gate(plain)))
    torch.testing.assert_close(seen[0], wanted[0])
    assert [layer.kind for layer in gated.report.layers] == ["varlen", "dense"]
    renamed = {name.replace("block.", ""): grad for name, grad in seen[1].items()}
    assert renamed.keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(renamed[name], gradient, rtol=1e-4, atol=1e-6)
