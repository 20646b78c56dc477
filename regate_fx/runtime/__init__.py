"""What selects the tokens to train on: a teacher's losses, the student's difficulties, a policy, a schedule."""

from regate_fx.runtime.gate import ReGate
from regate_fx.runtime.label_table import label_table
from regate_fx.runtime.policies import Policy, Signals
from regate_fx.runtime.schedule import DualCycle
from regate_fx.runtime.store import ReferenceLosses, SampleLosses
from regate_fx.runtime.teacher import teacher_losses

__all__ = [
    "DualCycle",
    "Policy",
    "ReGate",
    "ReferenceLosses",
    "SampleLosses",
    "Signals",
    "label_table",
    "teacher_losses",
]
