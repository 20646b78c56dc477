"""Random computations of masks: a value that is given a form has it at all pairs of positions that are no padding.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import run_on
from tiers import tiers
from torch import Tensor, fx, nn

from regate_fx.passes.base import fake
from regate_fx.passes.mask_forms import Constant, Form, Hides, Index, Padding, Sees, Two
from regate_fx.passes.pipeline import PIPELINE

B, S, D, V = 2, 9, 4, 23
STEPS = 60
LOWEST = torch.finfo(torch.float32).min
NUMBERS = [0, 1, 2, -1, 0.1, -0.5, 255, -1e4, -1e9, -1e20, LOWEST, torch.finfo(torch.float16).min, -torch.inf]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [torch.bool, torch.int64, torch.int32, torch.uint8, torch.int8, *FLOATS]
COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]

Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Step:
    """`make` of earlier values, the first of which is the attention mask."""

    make: Make
    sources: tuple[int, ...]

    def __call__(self, values: list[Tensor]) -> Tensor:
        return self.make(*(values[source] for source in self.sources))


def atom(choice: random.Random) -> Make:
    """Something to begin with, made of the attention mask or of its size."""
    number, dtype, floating = choice.choice(NUMBERS), choice.choice(DTYPES), choice.choice(FLOATS)
    shift, compare = choice.randint(-3, 3), choice.choice(COMPARISONS)
    index = lambda am, dtype=torch.int64: torch.arange(am.shape[1], dtype=dtype)  # noqa: E731
    square = lambda am, value, dtype: torch.full((am.shape[1], am.shape[1]), value, dtype=dtype)  # noqa: E731
    return choice.choice(
        [
            lambda am: compare(index(am)[:, None], index(am) + shift),
            lambda am: compare(index(am, dtype)[:, None] - shift, index(am, dtype)),
            lambda am: compare(index(am).to(dtype), (index(am).to(dtype) + 1).view(am.shape[1], 1)),
            lambda am: am.bool()[:, None, None, :],
            lambda am: am.bool()[:, None, :, None],
            lambda am: am[:, None, None, :],
            lambda am: torch.where(am.bool(), 0.0, number)[:, None, None, :],
            lambda am: torch.where(am.bool(), 0.0, torch.finfo(floating).min)[:, None, :, None],
            lambda am: square(am, 1, dtype).tril(shift),
            lambda am: square(am, 1, dtype).triu(shift),
            lambda am: square(am, -torch.inf, floating).triu(abs(shift)),
            lambda am: torch.where(index(am) <= index(am)[:, None], 0.0, torch.finfo(floating).min).to(
                floating
            ),
            lambda am: torch.full((1, 1, am.shape[1], am.shape[1]), 2, dtype=dtype),
        ]
    )


def made_of_one(choice: random.Random) -> Make:
    number, dtype, compare = choice.choice(NUMBERS), choice.choice(DTYPES), choice.choice(COMPARISONS)
    return choice.choice(
        [
            lambda x: ~x,
            torch.logical_not,
            lambda x: compare(x, number),
            lambda x: x + number,
            lambda x: number - x,
            lambda x: x - number,
            lambda x: x * number,
            lambda x: x / number,
            torch.neg,
            lambda x: x.to(dtype),
            lambda x: x.tril(),
            lambda x: x.triu(1),
            lambda x: x.transpose(-1, -2),
            lambda x: x[None],
            lambda x: x.unsqueeze(-3),
            lambda x: x.clamp(min=-1),
        ]
    )


def made_of_two(choice: random.Random) -> Make:
    number, other, alpha = choice.choice(NUMBERS), choice.choice(NUMBERS), choice.choice([1, 1, -1, 2])
    compare = choice.choice(COMPARISONS)
    return choice.choice(
        [
            operator.and_,
            operator.or_,
            operator.xor,
            torch.logical_and,
            torch.logical_or,
            lambda x, y: torch.add(x, y, alpha=alpha),
            operator.mul,
            compare,
            torch.maximum,
            lambda x, y: x.masked_fill(y, number),
            lambda x, y: x.clone().masked_fill_(y, number),
            lambda x, y: torch.where(x.bool(), y, number),
            lambda x, y: torch.where(x.bool(), number, y),
            lambda x, y: torch.where(x.bool() | y.bool(), number, other),
        ]
    )


def draw(seed: int, am: Tensor) -> list[Step]:
    """Steps that can be computed, most of them from what came last."""
    choice = random.Random(seed)
    steps: list[Step] = []
    values = [am]
    while len(steps) < STEPS:
        kind = choice.random()
        recent = range(max(1, len(values) - 10), len(values))
        if len(values) < 8 or kind < 0.2:
            step = Step(atom(choice), (0,))
        elif kind < 0.6:
            step = Step(made_of_one(choice), (choice.choice(recent),))
        else:
            step = Step(made_of_two(choice), (choice.choice(recent), choice.choice(recent)))
        try:
            value = step(values)
        except (RuntimeError, TypeError):
            continue
        # What has two values may have a form, and so may what is made of it.
        if 2 <= value.dim() <= 4 and (value.unique().numel() == 2 or choice.random() < 0.1):
            steps.append(step)
            values.append(value)
    return steps


class Masked(nn.Module):
    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.steps = steps

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        x = self.embedding(input_ids)[:, None]
        values = [attention_mask]
        for step in self.steps:
            values.append(step(values))
        return F.scaled_dot_product_attention(x, x, x, is_causal=True), *values[1:]


class Recorded(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def shows(of: Sees | Padding, am: Tensor) -> Tensor:
    """bool, to be broadcast to [B, 1, S, S]."""
    if isinstance(of, Padding):
        return (am != 0)[:, None, None, :] if of.dim == -1 else (am != 0)[:, None, :, None]
    ahead = torch.arange(S) - torch.arange(S)[:, None]
    return (ahead >= of.low) & (ahead <= of.high)


def agrees(form: Form, value: Tensor, am: Tensor) -> bool:
    if isinstance(form, Constant):
        return bool((value.double() == form.value).all())
    if isinstance(form, Index):
        indices = torch.arange(value.shape[form.dim]) + form.offset
        return bool((value == indices.view(-1, *[1] * (-form.dim - 1))).all())
    assert isinstance(form, (Sees, Padding, Two, Hides))
    if value.shape == am.shape:
        value = value[:, None, None, :]
    value = value.expand(B, 1, S, S)
    of = form.of if isinstance(form, (Two, Hides)) else form
    holds = shows(of, am).expand(B, 1, S, S)
    active = ((am != 0)[:, None, :, None] & (am != 0)[:, None, None, :]).expand(B, 1, S, S)
    inside, outside = (value[active & at].double() for at in (holds, ~holds))
    if isinstance(form, Two):
        return bool((inside == form.inside).all() and (outside == form.outside).all())
    if isinstance(form, Hides):
        hidden = outside <= torch.finfo(value.dtype).min
        return bool((inside == 0).all() and hidden.all()) and (
            form.number is None or bool((outside == form.number).all())
        )
    return not value.is_floating_point() and bool((inside != 0).all() and (outside == 0).all())


@pytest.mark.parametrize("seed", tiers(range(60), *range(6)))
def test_a_value_has_its_form(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # What is no padding may be any number, as the numbers of documents are.
    am = torch.randint(0, 4, (B, S), generator=generator)
    am[:, 0] = 1
    batch = {"input_ids": torch.randint(V, (B, S), generator=generator), "attention_mask": am}
    inputs: list[Any] = []

    def compiler(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            inputs.extend(args)
            return gm.forward(*args)

        return run

    names = [step.name for step in PIPELINE]
    passes = PIPELINE[: names.index("prove_masks") + 1]
    run = run_on(Masked(draw(seed, am)), batch, passes, compiler=compiler)
    recorded = Recorded(run.graph_module)
    recorded.run(*inputs)
    formed = 0
    for node, form in run.context.findings["forms"].items():
        value = recorded.values[node]
        if form is None or not isinstance(value, Tensor) or value.dim() == 3:
            continue
        formed += 1
        assert agrees(form, value, am), f"{node.format_node()}: {form}\n{value}"
        assert fake(node).dtype == value.dtype
    assert formed > 10
