"""Documents: where text comes from, and which of it is held out.

One file is one document; in a `.jsonl` file one line is. Documents keep a stable order, that of their names.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from longctx.data import files
from longctx.errors import UsageError

SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl")  # each also with .gz

# Left out of the standard library: installed packages; its tests, which not every distribution ships; and generated
# files (tables of character sets, the help's topics as strings), which are not written text.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"})


_WRITTEN = ("checkpoints", "damaged", "logs", "metrics", "processes", "report")  # by a run, names begin so


class Document(NamedTuple):
    """A text, and where it was read: a path, for a line of a `.jsonl` file also the line's number."""

    name: str
    text: str


def read(path: str) -> list[Document]:
    """The documents of a file or folder, in the order of their names; those without any text are left out.

    A folder is read recursively, through links too. Hidden files and folders, files of another kind, and working
    directories of runs are passed over.

    Args:
      path: a file or a folder; empty for the sources of the running interpreter's standard library.

    Raises:
      UsageError: when there is nothing there, no file of a kind that can be read, or no text in any; when a file or
        folder cannot be read, a file is not UTF-8 text, or a line of a `.jsonl` file is not a document.
    """
    if not path:
        return _standard_library()
    root = files.find(path, "data.path")
    if root.is_dir():
        found = [file for file in _walk(root) if _suffix(file) in SUFFIXES]
        if not found:
            raise UsageError(
                f"data.path is the folder '{root}', which holds no documents; "
                f"put files there that end in {_kinds()}, or name another folder"
            )
    elif root.exists():
        if _suffix(root) not in SUFFIXES:
            raise UsageError(
                f"data.path is '{root}', not a kind of file that can be read; give one ending in {_kinds()}"
            )
        found = [root]
    else:
        raise UsageError(
            f"data.path is '{root}', which does not exist; "
            "give a file or folder of documents, or leave it empty for the standard library's sources"
        )
    base = root if root.is_dir() else root.parent
    documents = [document for file in found for document in _documents(file, file.relative_to(base).as_posix())]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise UsageError(f"data.path is '{root}', whose documents are all empty; give documents with text in them")
    return documents


def split(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents.

    A document is held out when the hash of its text, as a number from 0 to 1, is below `fraction`: it stays on its
    side as the corpus grows, and copies of a document are on one side. What is held out is counted in characters:
    at most twice `fraction` of them, so that a document too long for that is trained on, and at least half of it, for
    which the documents next to the limit are held out too. Where all of those are too long, as of a lone document or
    of two, the longest one's end is held out; its copies are cut as it is.

    Args:
      documents: at least one.
      fraction: of the text to hold out, above 0 and below 1.

    Raises:
      UsageError: when several documents all have the same text, or there is too little text to be cut in two.
    """
    copies = Counter(document.text for document in documents)
    if len(copies) == 1 < len(documents):
        raise UsageError(
            f"the corpus is {len(documents)} copies of one document ('{documents[0].name}'), so nothing can be held "
            "out for evaluation; give documents that differ, or the one document alone"
        )
    sizes = {text: len(text) * count for text, count in copies.items()}
    total = sum(sizes.values())
    most = min(2 * fraction, (1 + fraction) / 2) * total  # something is left to train on
    chosen, taken = set(), 0
    for point, text in sorted((_point(text), text) for text in sizes):
        if (point < fraction or taken < fraction / 2 * total) and taken + sizes[text] <= most:
            chosen.add(text)
            taken += sizes[text]
    longest, cut = None, 0
    if taken < fraction / 2 * total:
        longest = max(sizes.keys() - chosen, key=lambda text: (sizes[text], text))
        cut = len(longest) - round((fraction * total - taken) / copies[longest])
        first, last = len(longest) - len(longest.lstrip()) + 1, len(longest.rstrip()) - 1  # neither part is blank
        if first > last:
            raise UsageError(
                f"the corpus has {total} characters ('{documents[0].name}' and so on), too few to hold out "
                f"{fraction:g} of them for evaluation; give more text"
            )
        cut = min(max(cut, first), last)
    train, heldout = [], []
    for name, text in documents:
        if text in chosen:
            heldout.append(Document(name, text))
        elif text == longest:
            train.append(Document(f"{name} (start)", text[:cut]))
            heldout.append(Document(f"{name} (end)", text[cut:]))
        else:
            train.append(Document(name, text))
    return train, heldout


def _point(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=6).digest()  # 48 bits, exact in a float
    return int.from_bytes(digest, "big") / 2**48


def _standard_library() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for file in _walk(root):
        name = file.relative_to(root)
        if file.suffix != ".py" or _NOT_LIBRARY.intersection(name.parts):
            continue
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:  # a few sources have another encoding on purpose
            continue
        if text.strip():
            documents.append(Document(name.as_posix(), text))
    return documents


def _walk(root: Path) -> list[Path]:
    """Files under `root`, hidden ones and those of runs left out, sorted by name.

    Links to folders are followed; a folder that is met again is passed over.
    """
    found, visited, folders = [], set(), [root]
    while folders:
        folder = folders.pop()
        try:
            status = folder.stat()
            with os.scandir(folder) as entries:
                inside = {entry.name: entry for entry in entries}
        except OSError as error:
            raise UsageError(f"'{folder}' cannot be read ({error.strerror}); mend it or take it away") from error
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        of_run = _is_run(folder, inside.keys())
        for name in sorted(inside, reverse=True):
            if (
                name.startswith(".")
                or name == "lost+found"
                or (of_run and (folder != root or name.startswith(_WRITTEN)))
            ):
                continue
            (folders if _is_folder(inside[name]) else found).append(folder / name)
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which is reported as a file that cannot be read
        return False


def _is_run(folder: Path, names: Collection[str]) -> bool:
    """Whether `folder` is the working directory of a run: what it writes is no text to train on."""
    if not {"config.json", "data.json"} <= set(names):
        return False
    try:
        config = json.loads(files.read(folder / "config.json", "it", 2**24))
    except (ValueError, RecursionError):
        return False
    return isinstance(config, dict) and {"model", "training"} <= config.keys()


def _suffix(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _kinds() -> str:
    return f"{', '.join(SUFFIXES)} (or these with .gz)"


def _documents(file: Path, name: str) -> list[Document]:
    text = _text(file)
    name = name.encode(errors="backslashreplace").decode()  # a file's name may be no text
    if _suffix(file) != ".jsonl":
        return [Document(name, text)]
    lines = enumerate(text.split("\n"), start=1)  # not splitlines: JSON strings may hold other line separators
    return [Document(f"{name}:{number}", _line(line, file, number)) for number, line in lines if line.strip()]


def _line(line: str, file: Path, number: int) -> str:
    """The text of one line of a `.jsonl` file."""
    expected = 'each line must be a string or an object with a "text" string; mend or delete it'
    try:
        value = json.loads(line, parse_int=float)  # a number may have more digits than an int is read from
    except json.JSONDecodeError as error:
        raise UsageError(
            f"'{file}', line {number}, is not JSON ({error.msg} at character {error.colno}); {expected}"
        ) from error
    except RecursionError as error:
        raise UsageError(f"'{file}', line {number}, is nested too deeply to be read; {expected}") from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        given = f"an object with {sorted(value)[:8]}" if isinstance(value, dict) else line.strip()[:40]
        raise UsageError(f"'{file}', line {number}, is {given}; {expected}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"'{file}', line {number}, holds half of a surrogate pair; {expected}") from error
    return text


def _text(file: Path) -> str:
    content = files.read(file, f"'{file}'")
    if file.name.lower().endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"'{file}' cannot be read ({error}); mend it or take it away") from error
    return files.decode(content, f"'{file}'")
