"""Show samples on a web page that is one file and needs no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from regate_fx.errors import InvalidInput
from regate_fx.inspection.terminal import counted, heat, number, scale, summary, visible
from regate_fx.inspection.tokens import SampleView, Standing, TokenView

_ALWAYS = (Standing.PROMPT, Standing.VISUAL)


@dataclass(frozen=True)
class _Stretch:
    """Neighbours that are shown alike. name: of a stretch without labels, which is shown folded; else empty."""

    name: str
    tokens: Sequence[TokenView]


def write_page(path: Path, views: Sequence[SampleView], title: str) -> None:
    """Write the page. Raises `InvalidInput` where the file cannot be written."""
    try:
        path.write_text(render(views, title), encoding="utf-8")
    except OSError as error:
        raise InvalidInput("html", f"{path} cannot be written: {error}.", "Choose another file.") from error


def render(views: Sequence[SampleView], title: str) -> str:
    """The page as HTML, whatever the texts of tokens hold."""
    environment = Environment(
        loader=PackageLoader("regate_fx.inspection", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "number": number}
    highest = scale(views)
    return environment.get_template("page.html").render(
        title=title,
        samples=[(view, summary(view), _stretches(view)) for view in views],
        highest=highest,
        heat=lambda token: f"{heat(token.reference, highest):.3f}",
        Standing=Standing,
    )


def _stretches(view: SampleView) -> list[_Stretch]:
    found = []
    for standing, run in groupby(
        view.tokens, key=lambda token: token.standing if token.standing in _ALWAYS else None
    ):
        tokens = list(run)
        found.append(_Stretch("" if standing is None else counted(tokens, standing), tokens))
    return found
