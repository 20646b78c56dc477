"""Train Hugging Face language models on the tokens that teach.

`compile(model)` returns the model with one more argument, `token_mask`: positions where it is False are
skipped in every decoder layer. `explain(model, ...)` tells beforehand what will be gated.
"""

from regate_fx import errors
from regate_fx.api import compile, explain
from regate_fx.wrapper import find_gated

__all__ = ["compile", "errors", "explain", "find_gated"]
__version__ = "0.1.0"
