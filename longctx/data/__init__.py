"""Text as rows of tokens: documents, tokenizers, packing, the retrieval task, the input pipeline."""

from longctx.data.needles import needle_rows
from longctx.data.packing import TokenStore, pad, stretches
from longctx.data.pipeline import Corpus, batches, describe, prepare
from longctx.data.tokenizers import TextStream, Tokenizer

__all__ = [
    "Corpus",
    "TextStream",
    "TokenStore",
    "Tokenizer",
    "batches",
    "describe",
    "needle_rows",
    "pad",
    "prepare",
    "stretches",
]
