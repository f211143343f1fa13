"""What an experiment is: frozen dataclasses, built from an experiment file's ConfigDict and validated together.

An experiment file (`experiments/*.py`) returns an `ml_collections.ConfigDict`. `parse` turns it into an
`Experiment`, once, at the boundary; everything inside the library reads these dataclasses. All that is wrong
is reported in one `UsageError`: unknown fields, wrong types, values that cannot be.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, ClassVar

from longctx import plugins, schema
from longctx.architecture import MLP, Mixer, Model
from longctx.errors import UsageError
from longctx.schema import Chosen, Options, Seed, Tokens


class Source(Chosen):
    """Where rows come from: `Data`, or one of `longctx.data.TASKS`."""

    kind_by_default = "corpus"


DEEPEST = 64  # levels of an experiment
MOST_TOKENS, LONGEST = 2**30, 2**27  # tokens of a training step, and of a row


@dataclasses.dataclass(frozen=True)
class Mesh(Options):
    """Devices along each axis of the mesh; -1, for at most one axis, takes what the others leave."""

    data: int = -1  # splits the batch, and the parameters
    context: int = 1  # splits the sequence, and the parameters
    model: int = 1  # splits heads and hidden widths

    def problems(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                yield f"{name} is {size}; give a number of devices, or -1 for all that the other axes leave"
        *others, last = [name for name, size in sizes.items() if size == -1] or [None]
        if others:
            yield f"{last} is -1 as {' and '.join(others)}: more than one axis open; give all but one a number"


@dataclasses.dataclass(frozen=True)
class Needles(Options):
    """The retrieval task planted in real text: facts (key, value) stated once and asked for later."""

    rows: float = 0.5  # fraction of the training rows that carry facts
    facts: int = 8  # facts per such row, each stated once and asked for once

    def problems(self):
        if not 0 <= self.rows <= 1:
            yield f"rows is {self.rows}; it is a fraction, give a number from 0 to 1"
        if self.facts < 1:
            yield f"facts is {self.facts}; give at least 1, or set rows to 0 for none"


@dataclasses.dataclass(frozen=True)
class Data(Options):
    """Where text comes from and how it becomes rows: the options of `data.kind = "corpus"`."""

    kind: ClassVar[str] = "corpus"

    path: str = ""  # a file or folder of documents; empty: the interpreter's own standard library
    tokenizer: str = "bpe"  # "bpe" (trained on the corpus), "bytes", or the path of a tokenizer.json
    vocab_size: int = 2048  # entries of the byte-pair vocabulary; "bytes" and a tokenizer.json have their own
    heldout: float = 0.05  # fraction of the text kept for evaluation: documents chosen by hash
    needles: Needles = Needles()  # facts planted in the text, and asked for later

    def problems(self):
        if not 0 < self.heldout < 1:
            yield f"heldout is {self.heldout}; it is a fraction of the text, give a number between 0 and 1"
        if self.vocab_size < (300 if self.tokenizer == "bpe" else 1):
            yield f"vocab_size is {self.vocab_size}; byte-pair encoding needs at least 300 entries, and any other 1"


@dataclasses.dataclass(frozen=True)
class Stage(Options):
    """A part of training at one length of rows."""

    steps: Tokens  # of the optimiser
    batch: int  # rows a step, over all devices
    length: Tokens  # tokens a row

    def problems(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                yield f"{name} is {value}; it must be at least 1"
        if self.length > LONGEST:
            yield f"length is {self.length:,}; a row has at most {LONGEST:,} tokens"
        elif self.batch * self.length > MOST_TOKENS:
            yield f"batch is {self.batch:,} and length is {self.length:,}; a step has at most {MOST_TOKENS:,} tokens"


@dataclasses.dataclass(frozen=True)
class Training(Options):
    """The optimisation: AdamW, linear warm-up, cosine decay, clipping by global norm."""

    stages: tuple[Stage, ...]  # short rows first; the last stage's length is the trained length
    learning_rate: float = 3e-3  # at its peak
    final_learning_rate: float = 0.1  # at the end, as a fraction of the peak
    warmup_steps: Tokens = 100  # over which the rate rises from 0
    schedule_steps: Tokens = 0  # after which the rate has fallen to the final one; 0: at the end of the last stage
    weight_decay: float = 0.1  # on matrices that multiply activations, and on nothing else
    beta1: float = 0.9  # of the running mean of gradients, what a step leaves
    beta2: float = 0.95  # likewise of their squares
    clip_norm: float = 1.0  # of the global gradient
    accumulate: int = 1  # micro-batches a step
    answer_weight: float = 1.0  # weight of a retrieval answer in the loss; any other token weighs 1
    label_smoothing: float = 0.0  # part of a target that is shared by the whole vocabulary
    z_loss: float = 0.0  # coefficient of the squared log of the softmax's sum, which is lowered beside the loss
    log_every: Tokens = 20  # steps between scalars

    def problems(self):
        if not self.stages:
            yield "stages is empty; give at least one (steps, batch, length)"
        for stage in self.stages:
            if self.accumulate >= 1 and stage.batch % self.accumulate:
                yield (
                    f"accumulate is {self.accumulate} and does not divide the batch of {stage.batch} rows; "
                    "change one of the two"
                )
        for name in ("accumulate", "log_every"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; it must be at least 1"
        for name in ("learning_rate", "clip_norm"):
            if getattr(self, name) <= 0:
                yield f"{name} is {getattr(self, name)}; it must be above 0"
        if self.steps > 2**31 - 1:
            yield f"stages has {self.steps:,} steps; at most {2**31 - 1:,} are possible"
        if not 1e-6 <= self.answer_weight <= 1e6:
            yield f"answer_weight is {self.answer_weight}; give a number from 1e-6 to 1e6, 1 for that of other tokens"
        for name in ("warmup_steps", "schedule_steps", "weight_decay", "final_learning_rate", "z_loss"):
            if getattr(self, name) < 0:
                yield f"{name} is {getattr(self, name)}; it must not be negative"
        for name in ("beta1", "beta2", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1 - 1e-7:  # what is nearer to 1 is 1 in float32
                yield f"{name} is {getattr(self, name)}; it must be at least 0 and below 1, at most 0.9999999"

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    @property
    def horizon(self) -> int:
        """Steps after which the rate has fallen to the final one."""
        return self.schedule_steps or self.steps


@dataclasses.dataclass(frozen=True)
class Checkpoints(Options):
    """When the training state is saved, under WORKDIR/checkpoints/<step>."""

    every: Tokens = 500  # steps
    keep: int = 2  # newest ones kept

    def problems(self):
        if self.every < 1 or self.keep < 1:
            yield f"every is {self.every} and keep is {self.keep}; both must be at least 1"


@dataclasses.dataclass(frozen=True)
class Evaluation(Options):
    """What the report measures: on held-out documents, or in new rows of a synthetic task."""

    factors: tuple[int, ...] = (1, 2, 4, 8)  # lengths tested, in multiples of the trained length
    depths: int = 5  # depths of the needle, from the start of the context to its end
    samples: int = 16  # needles per depth and length; of a synthetic task, rows per length
    tokens: Tokens = 2**22  # of a synthetic task's rows of one length, at most: of long rows there are fewer, but 4
    final_block: int = 128  # tokens of the fixed final block whose perplexity is measured
    documents: int = 32  # held-out documents for perplexity and loss by position
    every: Tokens = 0  # steps between measurements of the held-out loss while training; 0: only in the end
    heldout_tokens: Tokens = 2**20  # of the held-out text that the held-out loss is of, at most

    def problems(self):
        for name in ("depths", "samples", "tokens", "final_block", "documents", "heldout_tokens"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; it must be at least 1"
        if self.every < 0:
            yield f"every is {self.every}; give a number of steps, or 0 to measure only in the end"
        if not self.factors or any(factor < 1 for factor in self.factors):
            yield f"factors is {self.factors}; give whole multiples of the trained length, such as (1, 2, 4, 8)"


@dataclasses.dataclass(frozen=True)
class Experiment(Options):
    """Everything that a run is made from."""

    model: Model  # what is trained
    training: Training  # how it is trained
    data: Source = Data()  # or the options of a synthetic task, whose `kind` says which
    mesh: Mesh = Mesh()  # devices, and what they split
    checkpoints: Checkpoints = Checkpoints()  # when the state is saved
    evaluation: Evaluation = Evaluation()  # what the report measures
    init_from: str = ""  # WORKDIR[@STEP][:all]: a checkpoint of another run to start from; see longctx.training.origin
    seed: Seed = 0  # of the parameters, the order of the rows and what is planted in them
    plugins: tuple[str, ...] = ()  # modules and files that register layers of your own; those used are added

    def problems(self):
        context = self.mesh.context
        if isinstance(self.data, Data):
            yield from self._crowded()
        else:  # a synthetic task
            for stage in self.training.stages:
                if stage.length < self.data.shortest():
                    yield (
                        f"training.stages has rows of {stage.length} tokens, too few for the task '{self.data.kind}'; "
                        f"with its options they need {self.data.shortest()}"
                    )
        for stage in self.training.stages:
            if context > 1 and stage.length % context:
                yield (
                    f"training.stages has rows of {stage.length} tokens, which mesh.context={context} does not divide; "
                    "change one of the two"
                )

        if self.training.stages and self.evaluation.factors:
            length, factor = self.training.stages[-1].length, max(self.evaluation.factors)
            if length * factor > LONGEST:
                yield (
                    f"evaluation.factors has {factor:,}, of rows of {length:,} tokens; rows of at most {LONGEST:,} "
                    "tokens are possible"
                )

    def _crowded(self):
        needles, stages = self.data.needles, self.training.stages
        if needles.rows and stages and stages[-1].length < 3 * needles.facts + 3:
            yield (
                f"data.needles.facts is {needles.facts}, for which the last stage's rows have no room; "
                f"give fewer facts, or rows of at least {3 * needles.facts + 3} tokens"
            )


def parse(
    config: Mapping[str, Any],
    mixers: Mapping[str, type],
    mlps: Mapping[str, type],
    tasks: Mapping[str, type] = types.MappingProxyType({}),
) -> Experiment:
    """The experiment that a ConfigDict (or nested dict) describes.

    Args:
      config: what an experiment file's `get_config` returned, overrides applied; or what `to_dict` gives.
      mixers: name to mixer; each has a frozen dataclass `Config` of its options.
      mlps: name to MLP, likewise.
      tasks: name to synthetic task, each a frozen dataclass of its options.

    Raises:
      UsageError: with everything that is wrong, one line each.
    """
    tree = _resolved(config)
    if isinstance(tree, Mapping) and isinstance(named := tree.get("plugins", ()), tuple | list):
        tree = tree | {"plugins": (*plugins.load(name for name in named if isinstance(name, str)),)}
    tree = _with_heads(tree, mixers)
    experiment = schema.build(Experiment, tree, {Mixer: mixers, MLP: mlps, Source: {Data.kind: Data, **tasks}})
    needed = sorted(plugins.of(experiment) - set(experiment.plugins))
    return dataclasses.replace(experiment, plugins=(*experiment.plugins, *needed)) if needed else experiment


def following(options: type) -> tuple[str, ...]:
    """Fields of a mixer's options that follow the model's width where an experiment leaves them out: its heads.

    A mixer then has as many heads as make the model's width with the width of a head's values, if that divides it, and
    no fewer than its `Config` has by default; key-value heads keep their share of the heads.
    """
    names = [field.name for field in dataclasses.fields(options)]
    return tuple({"heads", "kv_heads"}.intersection(names)) if {"head_width", "value_width"}.intersection(names) else ()


def _with_heads(tree: Any, mixers: Mapping[str, type]) -> Any:
    """The experiment's tree with the heads of its mixers, where they are left out; what is not as expected stays."""

    def fitted(options: Any) -> Any:
        if not isinstance(options, Mapping):
            return options
        options = {name: fitted(value) for name, value in options.items()}  # mixers inside mixers
        kind = options.get("kind")
        if not isinstance(kind, str) or kind not in mixers:
            return options
        cls = schema.options_of(mixers[kind])
        names = following(cls)
        options = {name: value for name, value in options.items() if value is not None or name not in names}
        if "heads" not in names or "heads" in options:
            return options
        values = {field.name: field.default for field in dataclasses.fields(cls)} | options
        channels = values["head_width"] if "head_width" in values else values["value_width"]
        groups = options.get("kv_heads", 1)
        if not all(isinstance(size, int) and 1 <= size <= schema.CHANNELS for size in (width, channels, groups)):
            return options
        heads = values["heads"] if width % (channels * groups) else max(values["heads"], width // channels)
        if "kv_heads" in names and "kv_heads" not in options:
            options["kv_heads"] = values["kv_heads"] * heads // values["heads"]
            heads = options["kv_heads"] * values["heads"] // values["kv_heads"]
        return options | {"heads": heads}

    model = tree.get("model") if isinstance(tree, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(model.get("blocks"), Mapping):
        return tree
    width = model.get("width", Model.width)
    return tree | {"model": model | {"blocks": {name: fitted(block) for name, block in model["blocks"].items()}}}


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The experiment as nested dicts, lists and scalars: JSON, and what `parse` reads as the same experiment."""
    return schema.plain(experiment)


def _resolved(config: Any, depth: int = 0) -> Any:
    """ConfigDicts as dicts, references resolved."""
    if depth > DEEPEST:
        raise UsageError(f"the experiment has dictionaries or lists more than {DEEPEST} levels deep; make it flatter")
    if hasattr(config, "to_dict"):
        try:
            config = config.to_dict()
        except Exception as error:  # such as a value that the file requires from the command line
            raise UsageError(f"the experiment cannot be read: {error}") from error
    if isinstance(config, Mapping):
        return {key: _resolved(value, depth + 1) for key, value in config.items()}
    if isinstance(config, list | tuple):
        values = [_resolved(value, depth + 1) for value in config]
        return values if isinstance(config, list) else tuple(values)
    return config
