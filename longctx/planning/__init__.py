"""What the training step of an experiment takes on TPUs or GPUs, computed on a machine without one."""

from longctx.planning.compiled import plan
from longctx.planning.topology import describe

__all__ = ["describe", "plan"]
