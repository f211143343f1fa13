"""The loss, and one step of training, as pure functions of arrays over a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt32

from longctx import config
from longctx.errors import refused
from longctx.layers import reports
from longctx.models import LanguageModel
from longctx.ops.cross_entropy import cross_entropy
from longctx.parallel import mesh as meshes
from longctx.parallel import rules
from longctx.training import optimizer
from longctx.typing import Segments

Batch = Mapping[str, Array]  # of `[B, T]` arrays; see longctx.data


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      step: updates made so far.
      params: the model's parameters, as `nnx.as_pure` gives them; float32.
      optimizer: the state of the optax chain.
    """

    step: UInt32[Array, ""]
    params: Any
    optimizer: Any


class Sums(NamedTuple):
    """Sums over the tokens of a batch, from which its metrics follow."""

    total: Array  # float32: of weights * losses, z-loss included: what a step lowers
    z_loss: Array  # float32: the part of it that is z-loss
    weight: Array  # float32: of weights
    hits: Array  # int32: retrieval answers that have the largest logit
    answers: Array  # int32: retrieval answers
    recorded: dict[str, reports.Record]  # by the layers

    @property
    def loss(self) -> Array:
        """Of weights * losses alone."""
        return self.total - self.z_loss


def loss_sums(
    model: LanguageModel, batch: Batch, answer_weight: float, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Sums:
    """The sums of one (micro-)batch, split over the ambient mesh.

    A token weighs what the batch's `weights` say, and a retrieval answer `answer_weight` times that; of every target
    the whole vocabulary shares `label_smoothing`. `z_loss` is the coefficient of the squared log of the softmax's sum.
    """
    segments = Segments.from_ids(batch["segment_ids"], batch["positions"])
    with reports.collected() as recorded:
        hidden, _ = model(batch["tokens"], segments)
    weights = token_weights(batch, answer_weight)

    def own_tokens(*arrays):
        found = cross_entropy(*arrays, smoothing=label_smoothing, z_loss=z_loss)
        return found.total[None, None], found.z_loss[None, None], found.correct

    if meshes.size("data") * meshes.size("context") > 1:
        # An island over the tokens, so that the unembedding's gradient is summed over devices once, not once a chunk.
        rows, whole = PartitionSpec("data", "context"), PartitionSpec()
        own_tokens = jax.shard_map(
            own_tokens,
            in_specs=(rows, whole, rows, rows),
            out_specs=(rows, rows, rows),
            axis_names={"data", "context"},
            check_vma=False,
        )
    head = model.unembedding
    unembedding = dataclasses.replace(head, matrix=rules.gathered(head.matrix, ("vocab", "embed")))
    totals, squares, correct = own_tokens(hidden, unembedding, batch["targets"], weights)
    answers = batch["answers"]
    hits = jnp.sum(correct & answers)
    return Sums(totals.sum(), squares.sum(), weights.sum(), hits, jnp.sum(answers), recorded)


def token_weights(batch: Batch, answer_weight: float) -> Array:
    """`[B, T]` float32: what each token's loss weighs."""
    return batch["weights"] * jnp.where(batch["answers"], answer_weight, 1.0)


def new_model(experiment: config.Experiment, vocab_size: int, seed: UInt32[Array, ""] | None = None) -> LanguageModel:
    """The experiment's model with its initial parameters, which its seed gives, or another, which may be traced."""
    key = jax.random.key(experiment.seed if seed is None else seed)
    return LanguageModel(experiment.model, vocab_size, nnx.Rngs(params=key))


def abstract_model(experiment: config.Experiment, vocab_size: int) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure, and its parameters as shapes; `nnx.merge` makes the model of both.

    Raises:
      UsageError: a layer cannot be made with these options.
    """
    with refused("the model"):
        return nnx.split(nnx.eval_shape(lambda: new_model(experiment, vocab_size)), nnx.Param)


def placed(params: nnx.State, mesh: jax.sharding.Mesh) -> Any:
    """Pure shapes of parameters, each with its sharding over `mesh`."""
    return jax.tree.map(_shape, nnx.as_pure(params), nnx.as_pure(rules.shardings(mesh, params)))


@dataclasses.dataclass(frozen=True)
class Program:
    """A model, its optimiser and a mesh, as functions to call: `init` once, then what `compile` makes of `step`.

    Attributes:
      experiment: what it is made from.
      vocab_size: entries of the tokenizer.
      mesh: what the arrays are split over; its ambient scope (`jax.set_mesh`) is the caller's to enter.
      graphdef: of the model; `nnx.merge(graphdef, params)` is the model.
      abstract: the state's shapes, dtypes and shardings.
    """

    experiment: config.Experiment
    vocab_size: int
    mesh: jax.sharding.Mesh
    graphdef: nnx.GraphDef
    abstract: TrainState
    _optimizer: optax.GradientTransformationExtraArgs

    @classmethod
    def make(cls, experiment: config.Experiment, vocab_size: int, mesh: jax.sharding.Mesh) -> Program:
        """The program of an experiment over `mesh`; no array is made."""
        graphdef, variables = abstract_model(experiment, vocab_size)
        transform = optimizer.make(experiment.training, variables)
        params = placed(variables, mesh)
        moments = jax.eval_shape(transform.init, params)
        # A moment is split as its parameter is; counters are whole on every device.
        whole = NamedSharding(mesh, PartitionSpec())
        moments = optax.tree_map_params(
            transform,
            lambda moment, param: _shape(moment, param.sharding),
            moments,
            params,
            transform_non_params=lambda leaf: _shape(leaf, whole),
        )
        step = jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole)
        return cls(experiment, vocab_size, mesh, graphdef, TrainState(step, params, moments), transform)

    def model(self, params: Any) -> LanguageModel:
        """The model of parameters as a `TrainState` has them, of arrays or of shapes."""
        return nnx.merge(self.graphdef, params)

    @property
    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def init(self, seed: int | None = None) -> TrainState:
        """The state before the first step, made in place: no device ever holds more than its share.

        Args:
          seed: of the parameters; the experiment's by default. All seeds share one program.
        """
        return self._init(np.uint32(self.experiment.seed if seed is None else seed))

    @functools.cached_property
    def _init(self):
        def init(seed):
            params = nnx.as_pure(nnx.split(new_model(self.experiment, self.vocab_size, seed), nnx.Param)[1])
            return TrainState(jnp.zeros((), jnp.uint32), params, self._optimizer.init(params))

        return jax.jit(init, out_shardings=self._shardings)

    def begin(self, params: Any) -> TrainState:
        """The state before the first step, with these parameters, which it consumes."""

        def begin(params):
            return TrainState(jnp.zeros((), jnp.uint32), params, self._optimizer.init(params))

        return jax.jit(begin, donate_argnums=0, out_shardings=self._shardings)(params)

    def restarted(self, state: TrainState) -> TrainState:
        """A state before the first step, with all else as another run left it; it consumes the other."""

        def restart(state):
            return state._replace(step=jnp.zeros((), jnp.uint32))

        return jax.jit(restart, donate_argnums=0, out_shardings=self._shardings)(state)

    def rate(self, step: int) -> np.float32:
        """The learning rate of update number `step`, counted from 0, as a step is given it."""
        return np.float32(optimizer.learning_rate(self.experiment.training, step))

    def batch_sharding(self, shape: tuple[int, int]) -> NamedSharding:
        """How a batch's arrays `[B, T]` are split."""
        return NamedSharding(self.mesh, rules.spec(("batch", "time"), shape, self.mesh.shape))

    def batch(self, stage: config.Stage) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes, dtypes and shardings of a batch."""
        shape = (stage.batch, stage.length)
        sharding = self.batch_sharding(shape)
        dtypes = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
        dtypes |= {"answers": np.bool_, "segment_ids": np.int32, "positions": np.int32}
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}

    def arguments(self, stage: config.Stage) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct], Any]:
        """The shapes, dtypes and shardings of what a step is given: the state, a batch and a rate."""
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(self.mesh, PartitionSpec()))
        return self.abstract, self.batch(stage), rate

    def compile(self, stage: config.Stage) -> jax.stages.Compiled:
        """The step at one size of batch: `(state, batch, rate) -> (state, metrics)`.

        It consumes the state that it is given. The metrics are float32 scalars: `loss`, the mean over all weight in
        the batch, smoothed if targets are; `z_loss`, where there is one, of which `loss` has nothing; `gradient_norm`,
        before clipping; `learning_rate`; `hits` of `answers`, counts; and `layers_<name>`, the means of what layers
        record, whose weighted losses are lowered too and are not in `loss`.
        """
        return self.trace(stage).lower().compile()

    def trace(self, stage: config.Stage) -> jax.stages.Traced:
        """The same before it is compiled; asked for again it costs nothing.

        Raises:
          ValueError: a layer cannot compute rows of this length, or on this mesh.
        """
        return self._jitted.trace(*self.arguments(stage))

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self.step, donate_argnums=0, out_shardings=(self._shardings, None))

    def finite(self, state: TrainState) -> bool:
        """Whether every number of the state is."""
        return bool(self._finite((state.params, state.optimizer)))

    @functools.cached_property
    def _finite(self):
        def finite(tree):
            return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()

        return jax.jit(finite, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def step(self, state: TrainState, batch: Batch, rate: Float[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
        """One step, to be traced; see `compile`."""
        weight = token_weights(batch, self.experiment.training.answer_weight).sum()
        grads, sums = self._gradient(state.params, batch, weight)
        updates, moments = self._optimizer.update(grads, state.optimizer, state.params, rate=rate)
        metrics = {
            "loss": sums.loss / weight,
            "gradient_norm": optax.global_norm(grads),
            "learning_rate": rate,
            "hits": sums.hits,
            "answers": sums.answers,
        }
        if self.experiment.training.z_loss:
            metrics["z_loss"] = sums.z_loss / weight
        metrics |= {f"layers_{name}": record.mean for name, record in sums.recorded.items()}
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, moments), jax.tree.map(jnp.float32, metrics)

    def _gradient(self, params: Any, batch: Batch, weight: Array) -> tuple[Any, Sums]:
        """Of the mean loss of the whole batch, summed over its micro-batches one after another."""
        options = self.experiment.training
        count = options.accumulate

        def micro_batches(x):
            # Every count-th row, not a run of rows: each device keeps the rows it holds.
            x = jnp.moveaxis(x.reshape(x.shape[0] // count, count, x.shape[1]), 1, 0)
            return rules.constrain(x, (None, "batch", "time"))

        tokens = jnp.sum(batch["segment_ids"] > 0)

        def add(before, batch):
            def mean(params):
                model = self.model(params)
                sums = loss_sums(model, batch, options.answer_weight, options.label_smoothing, options.z_loss)
                loss = sums.total / weight
                if sums.recorded:  # means over a micro-batch, which counts by its share of the tokens
                    share = jnp.sum(batch["segment_ids"] > 0) / tokens
                    loss += share * sum(record.loss for record in sums.recorded.values())
                return loss, sums

            after, sums = jax.grad(mean, has_aux=True)(params)
            return jax.tree.map(jnp.add, before, after), sums

        start = jax.tree.map(jnp.zeros_like, params)
        gradient, sums = jax.lax.scan(add, start, jax.tree.map(micro_batches, dict(batch)))
        return gradient, jax.tree.map(lambda each: each.sum(0), sums)


def _shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
