"""Rows of tokens: documents, tokenizers, packing, the retrieval task, synthetic tasks, the input pipeline."""

from longctx.data.needles import needle_rows
from longctx.data.packing import Rows, TokenStore, pad, stretches
from longctx.data.pipeline import Corpus, Source, batches, describe, notes, prepare, unseen
from longctx.data.stream import TextStream
from longctx.data.synthetic import TASKS, Task, heldout_rng
from longctx.data.tokenizers import Tokenizer

__all__ = [
    "TASKS",
    "Corpus",
    "Rows",
    "Source",
    "Task",
    "TextStream",
    "TokenStore",
    "Tokenizer",
    "batches",
    "describe",
    "heldout_rng",
    "needle_rows",
    "notes",
    "pad",
    "prepare",
    "stretches",
    "unseen",
]
