"""ReGATE in the trainers that people use."""

from regate_fx.integrations.checkpoints import register
from regate_fx.integrations.trainer import attach

__all__ = ["attach", "register"]
