"""The dense reference masks the captured graph where it stands: every position is computed, elided ones hidden.

Shapes: B samples, S positions, D hidden size, H heads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import calls, capture, copy_graph, operators, run_on
from small_decoder import Block, D, Decoder, H, batch, causal_mask, hide, some_active
from torch import Tensor, fx, nn

from regate_fx.passes.base import PassContext, Refused
from regate_fx.passes.pipeline import REFERENCE, PipelineRun, run_passes

ATTENTION = "aten.scaled_dot_product_attention"


class Bent(Block):
    """Softmax of scores behind a function, which stays operators over pairs."""

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.o(hide(torch.sin(self.q(x) @ self.k(x).mT), mask).softmax(-1) @ self.v(x))


class Mixes(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) + self.norm(x).cumsum(1)


class SequenceFirst(Block):
    """States [S, B, D] between the layers."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attend(self.attention_norm(x).transpose(0, 1), mask).transpose(0, 1)
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Rows(Block):
    """States [S * B, D] between the layers; scores [S, S, B, H]."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        states = self.attention_norm(x).view(mask.shape[-1], -1, D).transpose(0, 1)
        x = x + self.attend(states, mask).transpose(0, 1).reshape(-1, D)
        return x + self.down(F.gelu(self.up(self.norm(x))))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (H, -1)) for project in (self.q, self.k, self.v))
        scores = hide(torch.einsum("bshd,bthd->bhst", q, k), mask).permute(2, 3, 0, 1)
        return self.o(torch.einsum("stbh,bthd->bshd", scores.softmax(1), v).flatten(2))


class Loss(Decoder):
    """The loss alone, of a model whose states may be sequence first."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        B, S = input_ids.shape
        x = self.embedding(input_ids) + self.positions(torch.arange(S))
        is_turned = isinstance(self.layers[0], (SequenceFirst, Rows))
        x = x.transpose(0, 1) if is_turned else x
        x = x.reshape(-1, D) if isinstance(self.layers[0], Rows) else x
        for layer in self.layers:
            x = layer(x, causal_mask(attention_mask, S))
        x = x.view(S, B, D).transpose(0, 1) if is_turned else x
        return self.loss(self.head(self.final_norm(x)), labels)


Step = tuple[Tensor, dict[str, Tensor]]


@dataclass
class Reference:
    """What running the masked graph gave, and the graph before and after the pass."""

    step: Step
    run: PipelineRun
    before: Counter[str]
    masks_before: list[str] = field(default_factory=list)


def reference(model: nn.Module, inputs: dict[str, Tensor], active: Tensor) -> Reference:
    runs: list[PipelineRun] = []
    found: dict[str, tuple[Counter[str], list[str]]] = {}

    def note(step: str, gm: fx.GraphModule) -> None:
        found[step] = operators(gm), masks_of(gm)

    def rewrite(gm: fx.GraphModule) -> fx.GraphModule:
        copied = fx.GraphModule(gm, copy_graph(gm))
        runs.append(run_passes(copied, PassContext(), REFERENCE, dump=note))
        return runs[0].graph_module

    seen = step(model, capture(model, inputs, active, rewrite).outputs[0])
    return Reference(seen, runs[0], *found["place"])


def masks_of(gm: fx.GraphModule) -> list[str]:
    return [str(call.args[3]) for call in calls(gm, ATTENTION)]


def step(model: nn.Module, loss: Tensor) -> Step:
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_same_step(seen: Step, wanted: Step) -> None:
    torch.testing.assert_close(seen[0], wanted[0], rtol=2e-5, atol=1e-6)
    assert seen[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        torch.testing.assert_close(seen[1][name], grad, rtol=2e-4, atol=2e-6)


def compute(*blocks: Block) -> tuple[Loss, dict[str, Tensor], Tensor, Reference]:
    """A model, a padded batch whose labels count where their predictor is active, what is active, and its reference."""
    model, inputs, active = Loss(blocks), batch(3, padded=True), some_active(3)
    active &= inputs["attention_mask"].bool()
    seen = reference(model, inputs, active)
    counted = F.pad(active[:, :-1], (1, 0))
    return model, {**inputs, "labels": inputs["labels"].masked_fill(~counted, -100)}, active, seen


KINDS: list[tuple[type[Block], ...]] = [(Block, Bent), (SequenceFirst,), (Rows,)]


@pytest.mark.parametrize("blocks", KINDS, ids=lambda blocks: blocks[0].__name__)
def test_gated_layers_compute_the_full_run_in_which_nobody_sees_an_elided_key(
    blocks: tuple[type[Block], ...],
) -> None:
    torch.manual_seed(0)
    model, inputs, active, seen = compute(*(block() for block in blocks))
    assert_same_step(seen.step, step(model, model(inputs["input_ids"], active.long(), inputs["labels"])))

    assert seen.run.rewrites["dense_reference"] == len(blocks) + 1  # the layers and the loss
    old, new = seen.before, operators(seen.run.graph_module)
    for name in ("linear", "layer_norm", "scaled_dot_product_attention", "softmax", "cross_entropy_loss"):
        assert new[f"aten.{name}"] == old[f"aten.{name}"], name
    assert not new["regate_fx.take_rows"] and not new["regate_fx.varlen_attention"]
    assert new["aten.index"] == old["aten.index"]
    assert new["aten.detach"] == old["aten.detach"] + len(blocks)
    for layer in seen.run.context.findings["layers"].layers:
        (held,) = layer.end.users
        assert held.target is torch.ops.aten.where.self and held.args[1] is layer.end
    (loss,) = calls(seen.run.graph_module, "aten.cross_entropy_loss")
    assert loss.args[3] == 0  # one for each label; what is counted is added up behind it


class ByHand(nn.Module):
    """What a gated layer means, written out: elided states stay as they were, as constants."""

    def __init__(self, block: nn.Module, active: Tensor) -> None:
        super().__init__()
        self.block, self.active = block, active

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(
            self.active[..., None], self.block(x, mask & self.active[:, None, None]), x.detach()
        )


def test_layers_that_are_not_gated_stay_as_they_are_and_are_not_counted() -> None:
    """They see the states that elided positions had before the gated layer."""
    torch.manual_seed(0)
    model, inputs, active, seen = compute(Block(), Mixes(), Mixes())
    assert [layer.refused is None for layer in seen.run.context.findings["layers"].layers] == [
        True,
        False,
        False,
    ]
    assert seen.run.rewrites["dense_reference"] == 2  # one layer and the loss
    masks = masks_of(seen.run.graph_module)
    assert [new == old for new, old in zip(masks, seen.masks_before, strict=True)] == [False, True, True]

    model.layers[0] = ByHand(model.layers[0], active)
    loss, grads = step(model, model(**inputs))
    named = {name.replace("layers.0.block.", "layers.0."): grad for name, grad in grads.items()}
    assert_same_step(seen.step, (loss, named))


class TwoSources(nn.Module):
    """Queries and keys from tables of their own: no value that all paths to the attention pass through."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder([Block()])
        self.keys = nn.Embedding(23, D)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x, y = (table(input_ids)[:, None] for table in (self.inner.embedding, self.keys))
        x = F.scaled_dot_product_attention(x, y, y, is_causal=True)[:, 0]
        return self.inner.loss(self.inner.head(x), labels)


class HeadsInTheBatch(nn.Module):
    """States [B * H, S, d] between attention and head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder([Block()])

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        B, S = input_ids.shape
        x = self.inner.embedding(input_ids).view(B, S, H, -1).transpose(1, 2).reshape(B * H, S, -1)
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        x = x.view(B, H, S, -1).transpose(1, 2).flatten(2)
        return self.inner.loss(self.inner.head(x), labels)


@pytest.mark.parametrize(
    ("module", "code", "reason"),
    [
        (TwoSources, "no-stream", "no residual stream"),
        (HeadsInTheBatch, "layout", "folds tokens with features"),
    ],
)
def test_what_it_cannot_mask_is_refused_by_name(module: type[nn.Module], code: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as caught:
        run_on(module(), batch(), REFERENCE)
    assert caught.value.code == code
