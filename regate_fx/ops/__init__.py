"""The custom operators of the `regate_fx` library: the one piece of global state of the project."""

from regate_fx.ops import attention, head_loss, marks, rows

__all__ = ["attention", "head_loss", "marks", "rows"]
