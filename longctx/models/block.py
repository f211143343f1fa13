"""One block: a mixer over the sequence and an MLP over the width, with norms, around a residual stream."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from longctx import architecture
from longctx.layers import MIXERS, MLPS, NORMS
from longctx.typing import Segments


class Block(nnx.Module):
    """A mixer and an MLP, one of which may be missing; the state is the tuple of theirs.

    With norms n and n' and the multiplier m, `options.residual` says what becomes of x:

        pre              x + m mixer(n(x)), then x + m mlp(n(x))           Xiong et al., 2020
        post             x + m n(mixer(x)), then x + m n(mlp(x))           OLMo 2
        sandwich         x + m n'(mixer(n(x))), then x + m n'(mlp(n(x)))   Gemma 2
        parallel         x + m (mixer(n(x)) + mlp(n'(x)))                  GPT-NeoX
        parallel_shared  x + m (mixer(n(x)) + mlp(n(x)))                   GPT-J, Falcon 7B, Phi

    Every norm has a scale of its own, but for the one of the last form. A second mixer, `beside`, reads what the first
    one reads, and their outputs are added (Falcon-H1). An MLP whose class says `reads_embedded = True` is also given
    the embeddings of the span's tokens, `embedded=`.
    """

    def __init__(self, width: int, options: architecture.Block, rngs: nnx.Rngs):
        def norm(mixer_or_mlp: Any, forms: tuple[str, ...]) -> nnx.Module | None:
            wanted = mixer_or_mlp is not None and options.residual in forms
            return NORMS[options.norm.kind](width, options=options.norm) if wanted else None

        def made(kinds, part: Any) -> nnx.Module | None:
            return None if part is None else kinds[part.kind](width, part, rngs)

        self.options = options
        self.mixer_norm = norm(options.mixer, ("pre", "sandwich", "parallel", "parallel_shared"))
        self.mixer = made(MIXERS, options.mixer)
        self.mixer_post_norm = norm(options.mixer, ("post", "sandwich"))
        self.mlp_norm = norm(options.mlp, ("pre", "sandwich", "parallel"))
        self.mlp = made(MLPS, options.mlp)
        self.mlp_post_norm = norm(options.mlp, ("post", "sandwich"))
        self.beside = made(MIXERS, options.beside)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segments: Segments | None = None,
        state: tuple | None = None,
        embedded: Float[Array, "B T D"] | None = None,
    ):
        """Returns `(y[B, T, D], state)`."""
        mixer_state, mlp_state, *beside_state = (None, None) if state is None else state
        more = {"embedded": embedded} if getattr(type(self.mlp), "reads_embedded", False) else {}
        normed = _normed(self.mixer_norm, x)
        y, mixer_state = _run(self.mixer, normed, segments, mixer_state)
        if self.beside is not None:
            y_beside, after = _run(self.beside, normed, segments, *(beside_state or [None]))
            y, beside_state = y + y_beside, [after]
        if self.options.residual in ("parallel", "parallel_shared"):
            read = normed if self.options.residual == "parallel_shared" else self.mlp_norm(x)
            z, mlp_state = _run(self.mlp, read, segments, mlp_state, **more)
            x = self._added(x, y + z)
        else:
            x = self._added(x, _normed(self.mixer_post_norm, y))
            z, mlp_state = _run(self.mlp, _normed(self.mlp_norm, x), segments, mlp_state, **more)
            x = self._added(x, _normed(self.mlp_post_norm, z))
        return x, (mixer_state, mlp_state, *beside_state)

    def _added(self, x, y):
        return x + (y if self.options.multiplier == 1 else self.options.multiplier * y)

    def init_state(self, batch: int, capacity: int, dtype) -> tuple:
        """The state of each of its layers before any token, with room for `capacity` tokens."""
        layers = [self.mixer, self.mlp, *([] if self.beside is None else [self.beside])]
        return tuple(None if layer is None else layer.init_state(batch, capacity, dtype) for layer in layers)


def _normed(norm: nnx.Module | None, x):
    return x if norm is None else norm(x)


def _run(layer: nnx.Module | None, x, segments, state, **more):
    """What a layer gives, and its state; 0 and None of one that is missing."""
    if layer is None:
        return 0.0, None
    with jax.named_scope(type(layer).__name__):
        return layer(x, segments, state, **more)
