"""A language model: embedding, patterns of blocks repeated, a norm, and logits.

Training repeats each pattern by a scan over stacked parameters. With a state it is a loop over the layers, written
out: each layer's state is then a tree of its own, of which a program that is given it may write a part in place.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from longctx import architecture, config
from longctx.layers import NORMS, reports
from longctx.models.block import Block
from longctx.ops.backend import platform
from longctx.ops.cross_entropy import Unembedding
from longctx.parallel.rules import constrain, gathered
from longctx.typing import Segments

_policies = jax.checkpoint_policies
# What the backward pass finds of each block, beside its input. Offloaded is the named input, not the output: the scan's
# carry stays on the device whatever a policy says.
_REMAT = {
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


_AXES = ("vocab", "embed")


class LanguageModel(nnx.Module):
    """`hidden, state = model(tokens, segments, state)`: one call for training, prefill and decoding.

    Logits are products of normed hidden vectors and the embedding, or of a matrix of its own that begins as it. A
    hidden vector begins as mostly its own token's: with unit logits that token's would be near √D, and the model as
    sure of the token it has just read as the width is large. So logits begin at `first_scale`, which the last norm has,
    or, untied, the matrix.

    Args:
      options: the model's part of the experiment.
      vocab_size: V, entries of the tokenizer.
      rngs: source of the initial values.
    """

    def __init__(self, options: config.Model, vocab_size: int, rngs: nnx.Rngs):
        self.options = options
        self.vocab_size = vocab_size
        width, embedding = options.width, options.embedding
        deviation = 1 / embedding.scale if embedding.scale else width**-0.5  # so that what the blocks read has 1
        normal = jax.nn.initializers.normal(deviation)
        self.embedding = nnx.Param(normal(rngs.params(), (vocab_size, width), jnp.float32), axes=_AXES, decays=True)
        # One Block per place in the patterns of the groups, each of its parameters stacked over the repeats.
        places = [(options.blocks[name], group.repeats) for group in options.scans for name in group.pattern]
        self.blocks = nnx.List([_stacked(width, block, repeats, rngs) for block, repeats in places])
        small = first_scale(width, vocab_size) * (width**-0.5 / deviation) / embedding.logit_scale
        norm = options.final_norm
        self.norm = NORMS[norm.kind](width, initial=small if embedding.tied else 1.0, options=norm)
        back = None if embedding.tied else nnx.Param(small * self.embedding[...], axes=_AXES, decays=True)
        self.back = back
        self.bias = nnx.Param(jnp.zeros(vocab_size), axes=("vocab",)) if embedding.bias else None
        nnx.update(self, _cast(nnx.state(self, nnx.Param), options.param_dtype))

    @property
    def dtype(self):
        """Of the activations: what the config says, or what the hardware multiplies fast."""
        if self.options.dtype == "auto":
            return jnp.float32 if platform() == "cpu" else jnp.bfloat16
        return jnp.dtype(self.options.dtype)

    @property
    def unembedding(self) -> Unembedding:
        """From hidden vectors to logits: the matrix is the embedding itself, or what the model has apart from it."""
        matrix = self.embedding if self.back is None else self.back
        bias = None if self.bias is None else self.bias[...]
        return Unembedding(matrix[...], bias, self.options.embedding.soft_cap)

    def __call__(self, tokens: Int[Array, "B T"], segments: Segments | None = None, state: Any = None):
        """Hidden vectors of a span, and the state after it.

        Args:
          tokens: `[B, T]`.
          segments: the documents of the span; None is one document.
          state: what `init_state` or an earlier span returned, one entry a layer. None: the empty state, and none is
            returned, so that training keeps no caches.

        Returns:
          `hidden[B, T, D]`, normed and ready for `logits` or the chunked loss, and the state (None if none was given).
        """
        embedding = self.options.embedding
        # Scaled to unit variance, since the same matrix may serve as the unembedding.
        # Rows gathered whole: a lookup in columns split over devices would make the compiler copy activations about.
        table = constrain(gathered(self.embedding[...], _AXES), ("vocab", None))
        x = table[tokens].astype(self.dtype) * (embedding.scale or math.sqrt(self.options.width))
        x = embedded = constrain(x, ("batch", "time", None))

        wanted = reports.collecting()

        def run(block, x, before):
            with reports.collected(wanted) as found:
                x, after = block(checkpoint_name(x, "block_input"), segments, before, embedded)
            return x, after, found

        # Block by block, so that the backward pass holds what one of them recomputes, however many are in the pattern.
        if self.options.remat != "none":
            run = jax.checkpoint(run, policy=_REMAT[self.options.remat])

        def through(x, blocks, states):
            after = []
            for block, before in zip(blocks, states, strict=True):
                x, block_state, found = run(block, x, before)
                x = constrain(x, ("batch", "time", None))
                after.append(block_state)
                reports.add(found)
            return x, tuple(after)

        if state is None:
            blocks = iter(self.blocks)
            for group in self.options.scans:
                nothing = (None,) * len(group.pattern)
                own = tuple(itertools.islice(blocks, len(nothing)))

                def repeat(x, blocks, nothing=nothing):
                    with reports.collected(wanted) as found:
                        x, _ = through(x, blocks, nothing)
                    return x, found

                x, found = jax.lax.scan(repeat, x, own)
                reports.add(jax.tree.map(lambda each: each.sum(0), found))
        else:
            x, state = through(x, self._layers(), state)
        hidden = self.norm(x)
        return (hidden if embedding.logit_scale == 1 else hidden * embedding.logit_scale), state

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of hidden vectors."""
        return self.unembedding.logits(hidden)

    def init_state(self, batch: int, capacity: int) -> tuple:
        """The state before any token, one entry a layer, with room for `capacity` tokens in caches that grow with the
        document. The first axis of every array is the row of the batch.
        """
        return tuple(block.init_state(batch, capacity, self.dtype) for block in self._layers())

    def unrolled(self) -> LanguageModel:
        """The same model as one repeat of a pattern that names every layer, each with parameters of its own.

        To be made once, before many steps that are given a state: such a step takes each layer's parameters out of the
        stacks, which copies them.
        """
        model, layers = nnx.merge(*nnx.split(self)), self.options.layers
        names = tuple(layer.block for layer in layers)
        model.options = dataclasses.replace(self.options, pattern=names, repeats=1, groups=())
        apart = [_apart(block) for block in self.blocks]
        model.blocks = nnx.List(apart[layer.place][layer.repeat] for layer in layers)
        return model

    @property
    def bounded(self) -> bool:
        """True if the state's size does not depend on the length of the document."""
        small, large = (jax.eval_shape(lambda c=c: self.init_state(1, c)) for c in (2**20, 2**21))
        return jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, large)

    def _layers(self) -> list[Block]:
        """The blocks of all layers, in their order."""
        layers = self.options.layers
        return [jax.tree.map(lambda leaf, i=layer.repeat: leaf[i], self.blocks[layer.place]) for layer in layers]


def _stacked(width: int, block: architecture.Block, repeats: int, rngs: nnx.Rngs) -> Block:
    """A Block whose parameters have a leading axis of `repeats`, each repeat initialised on its own."""
    keys = jax.random.split(rngs.params(), repeats)
    return jax.vmap(lambda key: Block(width, block, nnx.Rngs(params=key)))(keys)


def _apart(block: Block) -> list[Block]:
    """The repeats of a stacked Block, each a stack of one."""
    leaves, tree = jax.tree.flatten(block)
    parts = (jnp.split(leaf, leaf.shape[0]) for leaf in leaves)
    return [tree.unflatten(part) for part in zip(*parts, strict=True)]


def _cast(params: nnx.State, dtype: str) -> nnx.State:
    """Parameters with the matrices that multiply activations in another dtype."""

    def cast(variable: nnx.Param) -> nnx.Param:
        decays = variable.get_metadata().get("decays")
        return variable.replace(variable.get_value().astype(dtype)) if decays else variable

    return jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def first_scale(width: int, vocab_size: int, share: float = 0.02) -> float:
    """How large logits may begin, as a fraction of unit logits, that the loss is that of a uniform guess, log V.

    Of an initial loss of log V, noise of deviation s in the logits adds s² / 2, and the logit s √D of the token itself
    about exp(s √D) / V; each may add `share` of log V. s is as large as that allows: the smaller logits begin, the
    longer a tied embedding takes to make them large.
    """
    uniform = math.log(vocab_size)
    return min(1.0, math.sqrt(2 * share * uniform), math.log1p(share * vocab_size * uniform) / math.sqrt(width))


def parameter_count(model: nnx.Module) -> int:
    """Numbers in the model's parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
