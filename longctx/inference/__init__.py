"""Writing text with a trained model: prefill, decode, sampling."""

from longctx.inference.decode import Decode, generate
from longctx.inference.generation import Request, complete
from longctx.inference.prefill import Prefill
from longctx.inference.sampling import Sampling

__all__ = ["Decode", "Prefill", "Request", "Sampling", "complete", "generate"]
