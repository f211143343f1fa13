"""Where a model's parameters are: by part and by kind of block, from shapes alone."""

from __future__ import annotations

import math

from flax import nnx

from longctx import config
from longctx.models.language import LanguageModel

_COLUMNS = ("mixer", "mlp", "norms")
_PARTS = {"mixer": "mixer", "beside": "mixer", "mlp": "mlp"}  # of a block, and the column that has them


def parameter_table(experiment: config.Experiment, vocab_size: int) -> str:
    """A table of the model's parameters, to match models by: a row for each kind of block and for what is around them.

    A block's row is of all its copies, one a layer; no array is made.

    Raises:
      ValueError: as the model's layers, of options that cannot be.
    """
    options = experiment.model
    state = nnx.state(nnx.eval_shape(lambda: LanguageModel(options, vocab_size, nnx.Rngs(params=0))), nnx.Param)
    sizes = {path: math.prod(variable.get_value().shape) for path, variable in nnx.to_flat_state(state)}
    rows = []
    for name in dict.fromkeys(layer.block for layer in options.layers):
        own = [layer for layer in options.layers if layer.block == name]
        places = {layer.place for layer in own}
        counts = dict.fromkeys(_COLUMNS, 0)
        for path, size in sizes.items():
            if path[0] == "blocks" and path[1] in places:
                counts[_PARTS.get(path[2], "norms")] += size
        kinds = ", ".join(layer.kind for layer in options.blocks[name].layers.values())
        rows.append((f"{name}: {kinds}", len(own), *counts.values(), 0))
    norm = sum(size for path, size in sizes.items() if path[0] == "norm")
    around = sum(size for path, size in sizes.items() if path[0] not in ("blocks", "norm"))
    rows.append(("embedding" if options.embedding.tied else "embedding, and back", "", 0, 0, 0, around))
    rows.append(("last norm", "", 0, 0, norm, 0))
    sums = [sum(column) for column in zip(*(row[2:] for row in rows), strict=True)]
    rows.append(("all", "", *sums))
    lines = [("parameters", "copies", *_COLUMNS, "embedding", "together")]
    lines += [
        (name, str(copies), *(f"{n:,}" if n else "" for n in numbers), f"{sum(numbers):,}")
        for name, copies, *numbers in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))])
        for name, *cells in lines
    )
