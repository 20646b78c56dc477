"""ReGATE in the trainers that people use."""

from regate_fx.integrations.trainer import attach

__all__ = ["attach"]
