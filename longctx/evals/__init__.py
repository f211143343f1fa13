"""Measurements on held-out text, and the report of them."""

from longctx.evals.heldout import HeldOut
from longctx.evals.suite import check, evaluate

__all__ = ["HeldOut", "check", "evaluate"]
