"""How fast and how large is a forward pass, by the length of rows?"""

from __future__ import annotations

import time

import numpy as np

from longctx.evals.scorer import Scorer

REPEATS = 3


def speed(scorer: Scorer, stream: np.ndarray, lengths: list[int], tail: int) -> dict:
    """Tokens per second and memory of the forward pass, with the logits of the last `tail` tokens.

    Args:
      scorer: of the model; its batches hold about equal numbers of tokens at every length.
      stream: `[n]` tokens, repeated to fill the rows.
      lengths: tokens a row.
      tail: tokens scored.

    Returns:
      By length: `tokens_per_second` of all devices together (the median of three runs after a warm-up),
      `peak_bytes` a device by the compiler's account (parameters, inputs, outputs and temporaries at their
      largest), and `rows`, those of a call.
    """
    measured = {}
    for length in lengths:
        rows = np.resize(stream, (scorer.batch(length), length + 1))
        arrays = scorer.arrays(rows, length, tail)
        scorer.run(arrays, length, tail)
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            scorer.run(arrays, length, tail)
            seconds.append(time.perf_counter() - start)
        memory = scorer.program(length, tail).memory_analysis()
        measured[str(length)] = {
            "tokens_per_second": rows.shape[0] * length / float(np.median(seconds)),
            "peak_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes,
            "rows": rows.shape[0],
        }
    return measured
