"""Synthetic tasks: rows of integers with known answers, made on demand from a seed; no text, no tokenizer.

A task is a frozen dataclass of its options, named by `config.data.kind`; see `task.Task` for what it does. `TASKS` is
the registry that experiment files name.
"""

from longctx.data.synthetic.induction_heads import InductionHeads
from longctx.data.synthetic.mqar import MQAR
from longctx.data.synthetic.selective_copying import SelectiveCopying
from longctx.data.synthetic.state_tracking import StateTracking
from longctx.data.synthetic.task import Task, heldout_rng, training_rng
from longctx.schema import Kinds

TASKS = Kinds(
    {
        "induction_heads": InductionHeads,
        "mqar": MQAR,
        "selective_copying": SelectiveCopying,
        "state_tracking": StateTracking,
    }
)

__all__ = [
    "MQAR",
    "TASKS",
    "InductionHeads",
    "SelectiveCopying",
    "StateTracking",
    "Task",
    "heldout_rng",
    "training_rng",
]
