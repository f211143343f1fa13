"""longctx: long-context language models in JAX, every layer as a transition on a span."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longctx.data import Tokenizer
    from longctx.models import LanguageModel

__version__ = "0.1.0"


def load(workdir: str | os.PathLike) -> tuple[LanguageModel, Tokenizer | None]:
    """The model that a run trained, from its newest usable checkpoint, and its tokenizer.

    The model is placed over the ambient mesh (`jax.set_mesh(mesh)`, of `longctx.parallel.mesh.make`), or on the first
    device where there is none. It is called as `hidden, state = model(tokens, segments, state)`, with tokens `[B, T]`
    and hidden `[B, T, D]`; `model.logits(hidden)` is float32 `[B, T, V]`.

        model, tokenizer = longctx.load("runs/quickstart")
        tokens = tokenizer.encode("import os")[None]
        hidden, _ = model(tokens, Segments.single(*tokens.shape))  # of longctx.typing
        print(tokenizer.decode(model.logits(hidden)[0, -1:].argmax(-1)))

    Args:
      workdir: of the run.

    Returns:
      The model, and the tokenizer; None for a run of a synthetic task, whose tokens are numbers.

    Raises:
      UsageError: there is no run, or no usable checkpoint.
    """
    import jax  # here, as what follows: `import longctx` stays light

    from longctx.training import workdir as workdirs

    run = workdirs.open_run(workdir)
    mesh = jax.sharding.get_mesh()
    model, _ = workdirs.load_model(run, None if mesh.empty else mesh)
    return model, run.tokenizer
