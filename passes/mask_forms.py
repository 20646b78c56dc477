"""What is known of a mask's values: indices, bands of pairs, the padding mask, and numbers chosen by one of these.

All of it is about pairs of positions that are no padding: padding is never active.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from regate_fx.passes.axes import Token


@dataclass(frozen=True)
class Index:
    """Integers `index along dim + offset`; `dim` counts from the right, as broadcasting does."""

    token: Token
    dim: int
    offset: int = 0


@dataclass(frozen=True)
class Padding:
    """Whether position `dim` of the sample is no padding."""

    dim: int


@dataclass(frozen=True)
class Sees:
    """Booleans over (query, key) = dims (-2, -1): `low <= key - query <= high`."""

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Two:
    """Two numbers: one where `of` holds, another one elsewhere; booleans only if they are no `Sees` or `Padding`."""

    of: Sees | Padding
    inside: float
    outside: float


@dataclass(frozen=True)
class Hides:
    """Zero where `of` holds, elsewhere the lowest number or less, to be added to scores: `number` if it is known."""

    of: Sees | Padding
    number: float | None


@dataclass(frozen=True)
class Constant:
    value: float


Form = Index | Padding | Sees | Two | Hides | Constant | None


def as_sees(form: Form) -> Form:
    """What a query sees behind a mask, as one `Sees` if it is that."""
    if isinstance(form, Hides):
        form = form.of
    if isinstance(form, Constant):
        return Sees() if form.value else None
    return Sees() if form == Padding(-1) else form


def both(a: Form, b: Form) -> Form:
    if isinstance(a, Sees) and isinstance(b, Sees):
        return Sees(max(a.low, b.low), min(a.high, b.high))
    return None


def opposite(form: Form) -> Form:
    """Bools that are true where those of a form are not."""
    if isinstance(form, Two):
        return form.of if (form.inside, form.outside) == (0.0, 1.0) else None
    if not isinstance(form, (Sees, Padding)):
        return None
    if isinstance(form, Sees) and (form.low == -math.inf) != (form.high == math.inf):
        return Sees(low=form.high + 1) if form.low == -math.inf else Sees(high=form.low - 1)
    return Two(form, 0.0, 1.0)


def shown_by(condition: Form, value: bool) -> Form:
    """The pairs that a query sees, where bools of a form have a value."""
    return as_sees(condition if value else opposite(condition))
