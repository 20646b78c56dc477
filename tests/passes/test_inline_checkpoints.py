"""Gradient-checkpointed bodies are opened, and what they computed is still computed again in the backward pass."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from captured import capture, copy_graph, operators, run_on, run_until
from gating import assert_all_active_is_eager, assert_is_key_masked, gate
from small_decoder import batch, decoder, some_active
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from regate_fx.passes.base import PassContext, Refused
from regate_fx.passes.checkpointing import InlineCheckpoints
from regate_fx.passes.pipeline import NORMALISE, run_passes

D = 8
CALLS = {"forward": 0}


@torch.library.custom_op("pass_tests::counted_tanh", mutates_args=())
def counted_tanh(x: Tensor) -> Tensor:
    CALLS["forward"] += 1
    return x.tanh()


@counted_tanh.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _derivative(ctx: Any, grad: Tensor) -> Tensor:
    return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


counted_tanh.register_autograd(
    _derivative, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Checkpointed(nn.Module):
    """One recomputed body, with a nested dropout-free MLP; `options` go to `checkpoint`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding, self.up = nn.Embedding(11, D), nn.Linear(D, D)
        self.options = options

    def body(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = counted_tanh(self.up(x)).sin()
        return hidden * x, hidden

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        y, hidden = checkpoint(self.body, x, use_reentrant=False, **self.options)
        return (y * 2 + hidden).sin().sum()


@pytest.fixture
def counter() -> dict[str, int]:
    CALLS["forward"] = 0
    return CALLS


def test_bodies_become_part_of_the_graph_and_keep_their_tags(ids: dict[str, Tensor]) -> None:
    run = run_on(Checkpointed(), ids, (InlineCheckpoints(),))

    assert run.rewrites["inline_checkpoints"] == 1
    seen = operators(run.graph_module)
    assert seen["tag_activation_checkpoint"] == 0
    assert seen["linear"] == 1
    tagged = [node for node in run.graph_module.graph.nodes if "recompute" in node.meta]
    assert {node.meta["recompute"] for node in tagged} == {CheckpointPolicy.PREFER_RECOMPUTE}
    assert len({node.meta["ac_graph_id"] for node in tagged}) == 1
    assert not any("recompute" in node.meta for node in run.graph_module.graph.nodes if node.target == "sum")


def test_two_bodies_are_two_regions(ids: dict[str, Tensor]) -> None:
    module = nn.Sequential(nn.Embedding(11, D), nn.Linear(D, D), nn.Linear(D, D))

    def forward(input_ids: Tensor) -> Tensor:
        x = module[0](input_ids)
        for layer in module[1:]:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    wrapped = _Function(forward)
    run = run_on(wrapped, ids, (InlineCheckpoints(),))

    assert run.rewrites["inline_checkpoints"] == 2
    regions = [n.meta["ac_graph_id"] for n in run.graph_module.graph.nodes if "ac_graph_id" in n.meta]
    assert len(set(regions)) == 2


def test_a_graph_without_checkpoints_is_left_alone(ids: dict[str, Tensor]) -> None:
    run = run_on(
        nn.Sequential(nn.Embedding(11, D), nn.Linear(D, D)),
        {"input": ids["input_ids"]},
        (InlineCheckpoints(),),
    )
    assert run.rewrites["inline_checkpoints"] == 0


@pytest.mark.parametrize("tagged", [True, False])
def test_the_body_is_computed_again_in_the_backward_pass(
    tagged: bool, ids: dict[str, Tensor], counter: dict[str, int]
) -> None:
    """Without the tags the activation is kept: one call instead of two."""

    def rewrite(gm: fx.GraphModule) -> fx.GraphModule:
        normal = run_passes(fx.GraphModule(gm, copy_graph(gm)), PassContext(), NORMALISE).graph_module
        for node in normal.graph.nodes:
            if not tagged:
                node.meta.pop("recompute", None)
        return normal

    module = Checkpointed()
    compiled = capture(module, ids, rewrite=rewrite, compiler=lookup_backend("aot_eager"))
    counter["forward"] = 0
    compiled.outputs[0].backward()
    # capture() has run the forward pass once already; what is counted here is the backward pass.
    assert counter["forward"] == int(tagged)
    seen = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    module(**ids).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad)


def test_gated_layers_keep_the_tags() -> None:
    model = _checkpointed_decoder()
    run = run_until("elide_tokens", _Function(lambda **given: model(**given).loss), batch(), some_active())

    tagged = [node for node in run.graph_module.graph.nodes if "recompute" in node.meta]
    assert {str(node.target) for node in tagged} >= {
        "regate_fx.varlen_attention.default",
        "aten.gelu.default",
    }


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_gated_checkpointed_decoder_computes_what_the_eager_one_does(backend: str) -> None:
    model = _checkpointed_decoder()
    gated = gate(model, backend=backend)
    inputs = batch(padded=True)

    assert_is_key_masked(gated, model, inputs, some_active())
    assert_all_active_is_eager(gated, model, batch())


def _checkpointed_decoder() -> nn.Module:
    model = decoder()
    for layer in model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return model


class _Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, **inputs: Tensor) -> Any:
        return self.function(**inputs)


def _save_products(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = operator is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpointing_is_refused_by_name(ids: dict[str, Tensor]) -> None:
    policy = functools.partial(create_selective_checkpoint_contexts, _save_products)
    with pytest.raises(Refused, match="selective checkpointing") as caught:
        run_on(Checkpointed(context_fn=policy), ids, (InlineCheckpoints(),))
    assert caught.value.code == "selective-checkpoint"
