"""Numbers, and pairs of numbers, that masks are full of: an operator's results are found by running it on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from regate_fx.passes.base import fake
from regate_fx.passes.hidden_elements import is_elementwise, run_on_tensors
from regate_fx.passes.mask_forms import Constant, Form, Hides, Padding, Sees, Two, opposite
from regate_fx.passes.rules import Operands


def of_values(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    """The form of what an elementwise operator makes of two values that are chosen by one thing, or of numbers."""
    held: dict[fx.Node, Two | Constant] = {}
    for node in op.tensors():
        if (form := _held(node, forms)) is None:
            return None
        held[node] = form
    chosen_by = {form.of for form in held.values() if isinstance(form, Two)}
    if not held or len(chosen_by) > 1 or not is_elementwise(op.node):
        return None
    results = run_on_tensors(op.node, lambda node: _tensor(node, held[node]))
    if results is None or results.isnan().any():
        return None
    if not chosen_by:
        return Constant(float(results)) if results.numel() == 1 else None
    return two(op, chosen_by.pop(), *results.tolist()) if results.shape == (2,) else None


def _held(node: fx.Node, forms: dict[fx.Node, Form]) -> Two | Constant | None:
    form = forms.get(node)
    if isinstance(form, (Sees, Padding)) and fake(node).dtype is torch.bool:
        return Two(form, 1.0, 0.0)
    if isinstance(form, Hides) and form.number is not None:
        return Two(form.of, 0.0, form.number)
    return form if isinstance(form, (Two, Constant)) else None


def _tensor(node: fx.Node, form: Two | Constant) -> torch.Tensor:
    """The values of a form, in a tensor that has dimensions if the node's has."""
    value = fake(node)
    numbers = [form.inside, form.outside] if isinstance(form, Two) else [form.value]
    held = torch.tensor(numbers, dtype=torch.float64).to(value.dtype)
    return held if value.dim() else held.reshape(())


def two(op: Operands, of: Sees | Padding, inside: float, outside: float) -> Form:
    """The form of an operator's result that is one number where something holds, and another one elsewhere."""
    dtype = fake(op.node).dtype
    here, there = rounded(inside, dtype), rounded(outside, dtype)
    if here is None or there is None or here == there:
        return None
    if dtype is torch.bool:
        return of if here else opposite(of)
    if there == 0 and hides(here, dtype) and isinstance(rest := opposite(of), Sees):
        of, here, there = rest, there, here
    return Hides(of, there) if here == 0 and hides(there, dtype) else Two(of, here, there)


def hiding(seen: Form) -> Form:
    """A mask to be added to scores behind which a query sees what it does."""
    return Hides(seen, None) if isinstance(seen, Sees) else None


def hides(value: float, dtype: torch.dtype) -> bool:
    """Whether a number that is added to a score of a dtype leaves nothing of it."""
    return dtype.is_floating_point and value <= torch.finfo(dtype).min


def rounded(value: float, dtype: torch.dtype) -> float | None:
    """A number as a dtype has it; None where it does not."""
    if dtype.is_floating_point or dtype is torch.bool:
        return float(torch.tensor(value, dtype=torch.float64).to(dtype))
    limits = torch.iinfo(dtype)
    return value if limits.min <= value <= limits.max and value == int(value) else None


def constant(value: Any, forms: dict[fx.Node, Form]) -> float | None:
    """A number, or the one that a tensor is full of."""
    if isinstance(value, fx.Node):
        form = forms.get(value)
        return form.value if isinstance(form, Constant) else None
    return float(value)
