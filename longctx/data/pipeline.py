"""From a config to batches: documents read, tokenizer made, rows shuffled, planted, shared out and batched.

The input pipeline is a `grain` dataset with random access. Row i of a stage depends on the corpus or the task, the
seed, the stage and i alone, not on how many processes share the work, so a run can be resumed, or moved to other
machines, at the exact row.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from grain.experimental import get_next_index

from longctx import config
from longctx.data import corpus as documents
from longctx.data.needles import ROOM, Planter
from longctx.data.packing import Row, Rows, TokenStore
from longctx.data.synthetic import Task, training_rng
from longctx.data.tokenizers import Tokenizer
from longctx.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a run reads: its tokenizer, and its documents as tokens.

    Attributes:
      tokenizer: of both stores.
      train: training documents, in an order that the seed gives.
      heldout: held-out documents, in the order of their names.
      lost: share of the text's characters that the tokenizer cannot represent; training has the unknown token there.
    """

    tokenizer: Tokenizer
    train: TokenStore
    heldout: TokenStore
    lost: float = 0.0

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def heldout_share(self) -> float:
        """Of all tokens, those that are held out."""
        return self.heldout.size / (self.heldout.size + self.train.size)

    def fingerprint(self) -> dict[str, Any]:
        """What the corpus is, by content: equal for the same tokens in the same documents, whatever the seed.

        `training` is the digest of all training documents, `heldout` those of each held-out one.
        """
        return {
            "vocab_size": self.vocab_size,
            "training_tokens": self.train.size,
            "heldout_tokens": self.heldout.size,
            "training": hashlib.sha256(" ".join(self.train.digests()).encode()).hexdigest(),
            "heldout": self.heldout.digests(),
        }

    def differences(self, found: Mapping[str, Any], trained: bool = True) -> list[str]:
        """What differs from another fingerprint, in sentences.

        Args:
          found: the other fingerprint; digests that it lacks are not compared.
          trained: whether the training documents are compared; held-out ones always are.
        """
        given = self.fingerprint()
        names = ["vocab_size", "heldout_tokens", *(["training_tokens"] if trained else [])]
        lines = [
            f"{name}: {found.get(name)} then, {given[name]} now" for name in names if found.get(name) != given[name]
        ]
        if trained and found.get("training", given["training"]) != given["training"]:
            lines.append("the training documents hold another text, or are in another order")
        if (before := found.get("heldout", given["heldout"])) != given["heldout"]:
            before = set(map(str, before)) if isinstance(before, list) else set()
            names = sorted(self.heldout.names)
            new = [name for name, digest in zip(names, given["heldout"], strict=True) if digest not in before]
            lost = len(before - set(given["heldout"]))
            lines.append(
                f"{len(new)} of {len(names)} held-out documents were not held out then"
                + (f" ({_some(new)})" if new else "")
                + (f", and {lost} that were are not now" if lost else "")
            )
        return lines


MOST_LOST = 0.2  # share of the characters of a corpus that its tokenizer may lack

Source = Corpus | Task  # where rows come from; both have a `vocab_size`


class _Made:
    """The rows of a synthetic task, each made on demand from its own seed; more of them than anyone can read."""

    def __init__(self, task: Task, length: int, seed: int, stage_index: int):
        self._task, self._length, self._seeds = task, length, (seed, stage_index)

    def __len__(self) -> int:
        return 2**48

    def __getitem__(self, i: int) -> Row:
        rng = training_rng(*self._seeds, i)
        return {name: array[0] for name, array in self._task.rows(rng, 1, self._length).items()}


def prepare(data: config.Data | Task, seed: int, workdir: Path | None = None) -> Source:
    """Reads and encodes the documents that `data` names; a synthetic task has none, and is returned as it is.

    Args:
      data: what to read, and how to encode it.
      seed: of the order of the training documents, from 0 up.
      workdir: where `tokenizer.json` is kept: used when it is there, else made from `data` and written. None keeps
        nothing.

    Raises:
      UsageError: when the documents or the tokenizer cannot be used; nothing has been written then.
    """
    if isinstance(data, Task):
        return data
    texts = documents.read(data.path)
    train, heldout = documents.split(texts, data.heldout)
    kept = None if workdir is None else Path(workdir) / "tokenizer.json"
    if kept is not None and kept.exists():
        tokenizer = Tokenizer.load(kept)
    elif data.tokenizer == "bpe":
        tokenizer = Tokenizer.train((document.text for document in train), data.vocab_size)
    elif data.tokenizer == "bytes":
        tokenizer = Tokenizer.bytes()
    else:
        tokenizer = Tokenizer.load(data.tokenizer)
    lost, total = tokenizer.count_lost(document.text for document in texts)
    _require_known(lost, total, f"tokenizer ({data.tokenizer})")
    order = np.random.default_rng(seed).permutation(len(train))
    corpus = Corpus(
        tokenizer,
        TokenStore.encode([train[i] for i in order], tokenizer),
        TokenStore.encode(heldout, tokenizer),
        lost / max(total, 1),
    )
    if kept is not None and not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(kept)
    return corpus


def unseen(path: str, tokenizer: Tokenizer) -> Corpus:
    """All documents of a file or folder as held out, none of them for training.

    Raises:
      UsageError: when the documents cannot be used.
    """
    texts = documents.read(path)
    lost, total = tokenizer.count_lost(document.text for document in texts)
    _require_known(lost, total, "run's tokenizer")
    return Corpus(
        tokenizer, TokenStore.encode([], tokenizer), TokenStore.encode(texts, tokenizer), lost / max(total, 1)
    )


def _require_known(lost: int, total: int, tokenizer: str) -> None:
    if lost > MOST_LOST * total:
        raise UsageError(
            f"the {tokenizer} cannot represent {lost / total:.0%} of the corpus' characters, more "
            f"than the {MOST_LOST:.0%} with which training would mean something; give a tokenizer of the language, "
            "or 'bpe' or 'bytes', which represent every text"
        )


def batches(
    source: Source,
    data: config.Data | Task,
    stage: config.Stage,
    seed: int,
    stage_index: int,
    process: int = 0,
    processes: int = 1,
) -> grain.DatasetIterator[Row]:
    """An endless iterator over the batches of one stage of training.

    It is a grain iterator: `get_state` and `set_state` resume it exactly, and Orbax saves it as it is. Rows are
    shuffled anew each time the corpus has been gone through; those of a synthetic task never come again. Batch s is
    rows `s * batch` to `(s + 1) * batch` of that order, and a process has those whose number is `process` modulo
    `processes`.

    Args:
      source: what to read, or the task whose rows to make.
      data: what `source` was prepared from; of a corpus `needles` is used: how many rows carry facts, and how many.
      stage: length of a row, and rows of a batch over all processes.
      seed: of the order of the rows, and of what is planted in them, from 0 up.
      stage_index: of the stage in the experiment; each has its own order.
      process, processes: which share of each batch this is, of how many.

    Returns:
      An iterator over dicts of arrays `[batch / processes, length]`, as `data.packing` describes them.

    Raises:
      UsageError: when the corpus does not fill a row, the processes do not divide the batch, or the vocabulary has too
        few words for the facts.
    """
    if stage.batch % processes:
        raise UsageError(
            f"training.stages[{stage_index}] has a batch of {stage.batch} rows, which {processes} processes cannot "
            "share equally; give a multiple"
        )
    if isinstance(source, Task):
        dataset = grain.MapDataset.source(_Made(source, stage.length, seed, stage_index))
    else:
        dataset = _shuffled(source, data.needles, stage, seed, stage_index)
    share = dataset.slice(slice(process, None, processes)).batch(stage.batch // processes, drop_remainder=True)
    # One thread and few batches ahead: a batch takes far less time than a step, and the cores are the step's.
    return iter(share.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def _shuffled(
    corpus: Corpus, needles: config.Needles, stage: config.Stage, seed: int, stage_index: int
) -> grain.MapDataset[Row]:
    """The rows of a corpus, again and again, with facts planted in a part of them."""
    rows = Rows(corpus.train, stage.length)
    if len(rows) == 0:
        raise UsageError(
            f"training.stages[{stage_index}] has rows of {stage.length} tokens, and the corpus has {corpus.train.size} "
            f"training tokens; give more text, or rows of at most {corpus.train.size} tokens"
        )
    dataset = grain.MapDataset.source(rows).seed(int(np.random.SeedSequence((seed, stage_index)).generate_state(1)[0]))
    dataset = dataset.shuffle().repeat()
    if needles.rows == 0:
        return dataset
    if rows.longest().max() < ROOM:
        raise UsageError(
            f"data.needles.rows is {needles.rows:g}, and no row of training.stages[{stage_index}] has a piece of "
            f"{ROOM} tokens, which a fact and its question take; give longer documents or rows, or data.needles.rows=0"
        )
    planter = Planter(corpus.tokenizer, needles.facts)

    def plant(row: Row, rng: np.random.Generator) -> Row:
        return planter.plant(row, rng) if rng.random() < needles.rows else row

    return dataset.random_map(plant)


def notes(source: Source, data: config.Data | Task, stages: Sequence[config.Stage]) -> list[str]:
    """What a reader of the run's numbers should know of its source, in sentences.

    How much text was held out, what the tokenizer cannot represent, and how many of the facts that were asked for
    fit in the training rows.
    """
    if not isinstance(source, Corpus):
        return []
    count = len(source.heldout)
    lines = [
        f"Held out: {count} of {count + len(source.train)} documents ({_some(source.heldout.names)}), "
        f"{source.heldout_share:.1%} of the text.",
        f"The tokenizer cannot represent {source.lost:.2%} of the text's characters."
        if source.lost
        else "The tokenizer represents all of the text.",
    ]
    for index, stage in enumerate(stages if data.needles.rows else ()):
        room = Rows(source.train, stage.length).longest() // ROOM
        planted = np.minimum(room, data.needles.facts)
        if len(room) and planted.mean() < 0.95 * data.needles.facts:
            lines.append(
                f"Facts fit in {np.mean(room > 0):.1%} of the rows of training.stages[{index}], and "
                f"{planted.mean():.1f} of the {data.needles.facts} asked for on average: its documents are short."
            )
    return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")


def describe(iterator: grain.DatasetIterator, stage: config.Stage, stage_index: int) -> str:
    """Names the batch that `iterator` gave last, for messages: "batch 37 of stage 1 (its rows 592 to 607)"."""
    batch = get_next_index(iterator) - 1
    return f"batch {batch} of stage {stage_index} (its rows {batch * stage.batch} to {(batch + 1) * stage.batch - 1})"
