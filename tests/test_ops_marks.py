"""The operators that only mark a place in a captured graph.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from regate_fx.ops.marks import anchor, cast, opaque
from regate_fx.plan import make_plan

MASK = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)


@pytest.mark.parametrize("grid", [None, torch.ones(2, 4, dtype=torch.int64)], ids=["bare", "labelled"])
def test_opcheck_of_anchor(grid: Tensor | None) -> None:
    torch.library.opcheck(anchor, (*make_plan(MASK).tensors(), grid, grid))


def test_what_an_anchor_gives_that_nothing_replaced_is_no_result() -> None:
    token_loss, counted = anchor(*make_plan(MASK).tensors(), None, None)
    assert token_loss.shape == counted.shape == MASK.shape
    assert (token_loss < 0).all()  # no loss of a label is
    assert not token_loss.isfinite().any()  # and what takes in losses refuses these
    assert not counted.any()


@pytest.mark.parametrize("x", [torch.randn(3, 4), torch.randn(4, 3).t()], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck_of_cast(x: Tensor, dtype: torch.dtype) -> None:
    torch.library.opcheck(cast, (x, dtype))


def test_cast_refuses_to_be_differentiated() -> None:
    """It is gone before a derivative is taken; if it were not, a gradient would stop here in silence."""
    with pytest.raises(RuntimeError, match="no autograd formula"):
        cast(torch.ones(2, requires_grad=True), torch.bfloat16).sum().backward()


def test_opcheck_of_opaque() -> None:
    # The others run the operator, which by design must not: it is replaced by what it stands for.
    operands = [torch.randn(3, 4), torch.ones(2, dtype=torch.int64)]
    torch.library.opcheck(
        opaque, (operands, [3], [1, 0], [-1, -1], 0), test_utils="test_autograd_registration"
    )


def test_opaque_is_shaped_as_it_is_told_and_does_not_run() -> None:
    operands = [torch.randn(4, 3).t(), torch.ones(2, dtype=torch.int64)]
    as_told = [2, 1, 0, -1, 7]  # two dimensions: as long as the first of operand 1, and of size 7
    with FakeTensorMode(allow_non_fake_inputs=True):
        outputs = opaque(operands, [3], [1, 0, 0, 1], [-1, -1, *as_told, 0], 0)
    wanted = [operands[1], operands[0], torch.empty(2, 7), torch.empty((), dtype=torch.int64)]
    assert [(o.shape, o.dtype) for o in outputs] == [(w.shape, w.dtype) for w in wanted]
    with pytest.raises(AssertionError, match="must not run"):
        opaque(operands, [3], [1, 0], [-1, -1], 0)
