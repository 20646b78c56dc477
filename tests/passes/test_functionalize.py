"""Normalisation, and every hazard of it: each cure is shown to be needed by taking it away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import capture, operators, run_until
from normalising import D, Small, V, assert_as_eager, normalise, step
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_module
from torch.testing._internal.two_tensor import TwoTensor

from regate_fx.errors import PassFailed
from regate_fx.passes import brackets, functionalize
from regate_fx.passes.base import PassContext, Refused, operator_name
from regate_fx.passes.pipeline import NORMALISE, run_passes


def new_empty(w: Small, x: Tensor) -> Tensor:
    y = x.new_empty(*x.shape[:2], 2 * D)
    y[..., :D] = w.up(x)
    y[..., D:] = x
    return y


def scatter_(w: Small, x: Tensor) -> Tensor:
    kept = torch.zeros_like(x)
    kept.scatter_(-1, x.topk(2, -1).indices, 1.0)
    return w.up(x) * kept


def add_(w: Small, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.add_(w.up(x))
    return y


def index_put_(w: Small, x: Tensor) -> Tensor:
    y = torch.zeros_like(x).view(-1, D)
    y.index_put_((torch.arange(x.shape[0] * x.shape[1]),), w.up(x).view(-1, D))
    return y.view(x.shape)


IN_PLACE = {body.__name__: body for body in (new_empty, scatter_, add_, index_put_)}

# What the pass rewrites in any of these graphs: the capture asserts two sizes again.
SIZES = 2


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_writes_become_values(name: str, ids: dict[str, Tensor]) -> None:
    module = Small(IN_PLACE[name])
    assert_as_eager(module, ids)

    run = run_until("functionalize", module, ids)
    targets = [n.target for n in run.graph_module.graph.nodes if n.op == "call_function"]
    overloads = [target for target in targets if isinstance(target, torch._ops.OpOverload)]
    assert not any(target._schema.is_mutable for target in overloads)
    assert not run.graph_module.graph.find_nodes(op="call_method", target=name)
    slices = 2 if name == "new_empty" else 0  # each a `copy` without a derivative
    assert run.rewrites["functionalize"] == SIZES + slices


@pytest.mark.parametrize("name", IN_PLACE)
def test_before_normalisation_a_write_is_a_dependence_without_an_edge(
    name: str, ids: dict[str, Tensor]
) -> None:
    """Why all analysis waits for this pass: what is written is no input of what is returned."""
    module = Small(IN_PLACE[name])
    raw = capture(module, ids).graph_module
    normal = run_until("functionalize", module, ids).graph_module

    assert not _reached_by(raw, "linear", _returned(raw)) or name == "scatter_"
    assert _reached_by(normal, "aten.linear", _returned(normal))
    if name == "scatter_":
        assert not _reached_by(raw, "topk", _returned(raw))
        assert _reached_by(normal, "aten.topk", _returned(normal))


def _returned(gm: fx.GraphModule) -> fx.Node:
    return gm.graph.output_node().args[0][0]  # type: ignore[index, return-value]


def _reached_by(gm: fx.GraphModule, name: str, node: fx.Node) -> bool:
    seen, todo = set(), [node]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        todo.extend(current.all_input_nodes)
    return any(n.op.startswith("call_") and operator_name(n) == name for n in seen)


class TripledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return 3 * grad * y, 3 * grad * x


def custom_backward(w: Small, x: Tensor) -> Tensor:
    return TripledGradient.apply(w.up(x), x)


def test_an_autograd_function_keeps_its_own_backward(ids: dict[str, Tensor]) -> None:
    module = Small(custom_backward)
    assert_as_eager(module, ids)
    run = run_until("functionalize", module, ids)
    assert operators(run.graph_module)["autograd_function_apply"] == 1
    assert run.rewrites["functionalize"] == SIZES + 1


def test_without_the_shield_an_autograd_function_has_another_gradient(
    ids: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functionalize, "shield", lambda gm: [])
    with pytest.raises(AssertionError):
        assert_as_eager(Small(custom_backward), ids)


class Shaped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[..., None].expand(*grad.shape, D)


def test_an_autograd_function_may_return_another_shape(ids: dict[str, Tensor]) -> None:
    assert_as_eager(Small(lambda w, x: x * Shaped.apply(w.up(x))[..., None]), ids)


class Returning(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, twice: bool) -> Tensor:
        return torch.cat((x, x), 1) if twice else x.double()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[:, : grad.shape[1] // 2].float(), None


@pytest.mark.parametrize(
    ("twice", "words"), [(True, r"a size, 2\*s\d+, that none of its inputs has"), (False, "dtype")]
)
def test_an_autograd_function_whose_result_cannot_be_described_is_refused_by_name(
    twice: bool, words: str, ids: dict[str, Tensor]
) -> None:
    with pytest.raises(Refused, match=words) as caught:
        run_until("functionalize", Small(lambda w, x: Returning.apply(w.up(x), twice)), ids)
    assert caught.value.code == "function-shape"


def test_a_weight_that_is_a_subclass_of_tensor_is_refused_by_name(ids: dict[str, Tensor]) -> None:
    module = Small(lambda w, x: w.up(x))
    weight = module.up.weight.detach()
    module.up.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    with pytest.raises(Refused, match="up_parameters_weight_ is a TwoTensor, a subclass of Tensor") as caught:
        run_until("functionalize", module, ids)
    assert caught.value.code == "tensor-subclass"


def running_mean(w: Small, x: Tensor) -> Tensor:
    y = w.up(x) - w.mean
    w.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
    w.count += x.shape[1]
    return y


def test_buffers_are_written_back(ids: dict[str, Tensor]) -> None:
    """The buffers after each of three calls are those of an eager model."""
    seen, wanted = Small(running_mean), Small(running_mean)
    wanted.load_state_dict(seen.state_dict())
    for call in range(3):
        batch = {"input_ids": torch.randint(V, (2, 5 + call))}
        ours = capture(seen, batch, rewrite=normalise).outputs[0]
        torch.testing.assert_close(ours, wanted(**batch))
        for ours, theirs in zip(seen.buffers(), wanted.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_without_writing_back_the_outputs_are_other_values(
    ids: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functionalize, "_restore_mutations", lambda gm, signature: 0)
    module = Small(running_mean)
    outputs = capture(module, ids, rewrite=normalise).outputs
    assert outputs[0].shape != (2, 5, D)
    assert not module.mean.any()


class Aliases(nn.Module):
    """Outputs that are inputs, views of inputs and the same value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        x = self.embedding(input_ids)
        return x, input_ids, labels.view(-1), x.transpose(0, 1), x, input_ids[:, 1:]


def test_outputs_that_alias_keep_their_order_and_values(ids: dict[str, Tensor]) -> None:
    inputs = {**ids, "labels": ids["input_ids"] + 1}
    assert_as_eager(Aliases(), inputs)


def test_dropout_stays_one_operator_and_draws_what_eager_draws(ids: dict[str, Tensor]) -> None:
    module = Small(lambda w, x: F.dropout(w.up(x), 0.3))
    assert_as_eager(module, ids)

    seen = operators(run_until("functionalize", module, ids).graph_module)
    assert seen["aten.dropout"] == 1

    large = {"input_ids": torch.randint(V, (64, 50))}
    dropped = capture(module, large, rewrite=normalise).outputs[0].eq(0).double().mean()
    trials = 64 * 50 * D
    assert abs(float(dropped) - 0.3) < 5 * (0.3 * 0.7 / trials) ** 0.5


def frozen_part(w: Small, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = w.up(x).tanh()
    return x * scale


def frozen_phases(w: Small, x: Tensor) -> Tensor:
    with torch.no_grad():
        phases = torch.polar(torch.ones_like(x), w.up(x))
    return (x * phases).real


@pytest.mark.parametrize("body", [frozen_part, frozen_phases])
def test_what_a_no_grad_region_computes_has_no_gradient(
    body: Callable[[Small, Tensor], Tensor], ids: dict[str, Tensor]
) -> None:
    module = Small(body)
    assert_as_eager(module, ids)
    assert set(step(capture(module, ids, rewrite=normalise).outputs, module)) == {"embedding.weight"}


def test_without_detaching_a_no_grad_region_would_have_one(
    ids: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brackets, "_detach", lambda gm, node, constants: None)
    module = Small(frozen_part)
    seen = step(capture(module, ids, rewrite=normalise).outputs, module)
    assert {"up.weight", "up.bias"} <= set(seen)


def clamped_in_place(w: Small, x: Tensor) -> Tensor:
    y = w.up(x)
    with torch.no_grad():
        y.clamp_(-1, 1)
    return y * x


def test_a_write_under_no_grad_is_refused_by_name(ids: dict[str, Tensor]) -> None:
    """Eager writes the data and keeps the history; as a value of its own the result would have none."""
    with pytest.raises(Refused, match="no_grad") as caught:
        run_until("open_brackets", Small(clamped_in_place), ids)
    assert "clamp_" in str(caught.value)


def branch(w: Small, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))


def test_an_unknown_higher_order_operator_is_refused_by_name(ids: dict[str, Tensor]) -> None:
    with pytest.raises(Refused, match="higher-order operator cond") as caught:
        run_until("functionalize", Small(branch), ids)
    assert caught.value.code == "higher-order"


def test_a_batched_transform_is_refused_by_name(ids: dict[str, Tensor]) -> None:
    body = lambda w, x: torch.vmap(lambda row: row.cumsum(0))(x)  # noqa: E731
    with pytest.raises((Refused, PassFailed), match=r"functorch|vmap"):
        run_until("functionalize", Small(body), ids)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_graph_with_state_of_its_own_is_refused(kind: str, ids: dict[str, Tensor]) -> None:
    """Dynamo makes parameters and buffers graph inputs; what is written to others would be lost."""
    raw = capture(Small(running_mean), ids).graph_module
    held = nn.Parameter(torch.zeros(D)) if kind == "parameter" else torch.zeros(D)
    getattr(raw, f"register_{kind}")("held", held)
    with pytest.raises(Refused, match="not a graph input") as caught:
        run_passes(raw, PassContext(), NORMALISE)
    assert caught.value.code == "mutation"


def test_export_itself_does_not_restore_mutations(ids: dict[str, Tensor]) -> None:
    """The hazard as torch has it: mutated inputs come first in the outputs, and nothing writes them back."""
    raw = capture(Small(running_mean), ids).graph_module
    inputs = [node.meta["example_value"] for node in raw.graph.find_nodes(op="placeholder")]
    exported, signature = aot_export_module(raw, inputs, trace_joint=False, pre_dispatch=True)
    assert len(signature.user_inputs_to_mutate) == 2
    assert operators(exported)["aten.copy_"] == 0
    run = run_until("functionalize", Small(running_mean), ids)
    assert operators(run.graph_module)["aten.copy_"] == 2
    assert run.rewrites["functionalize"] == SIZES + 2
