"""Train Hugging Face language models on the tokens that teach.

`compile(model)` returns the model with one more argument, `token_mask`: positions where it is False are
skipped in every decoder layer. `explain(model, ...)` tells beforehand what will be gated.
"""

from regate_fx import errors
from regate_fx.api import compile, explain

__all__ = ["compile", "errors", "explain"]
__version__ = "0.1.0"
