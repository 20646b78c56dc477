"""The custom operators of the `regate_fx` library: the one piece of global state of the project."""

from regate_fx.ops import attention, marks, rows

__all__ = ["attention", "marks", "rows"]
