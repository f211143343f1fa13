"""longctx: long-context language models in JAX, every layer as a transition on a span."""

__version__ = "0.1.0"
