"""What selects the tokens to train on: a teacher's losses, the student's difficulties, a schedule."""

from regate_fx.runtime.gate import ReGate
from regate_fx.runtime.schedule import DualCycle
from regate_fx.runtime.store import ReferenceLosses, SampleLosses
from regate_fx.runtime.teacher import teacher_losses

__all__ = ["DualCycle", "ReGate", "ReferenceLosses", "SampleLosses", "teacher_losses"]
