"""Text in, text out, and the command around it."""

import io
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from flax import nnx

from longctx import commands, generate
from longctx.errors import UsageError
from longctx.inference import Request, Sampling, complete
from longctx.inference import generate as generate_tokens

GREEDY = Sampling(temperature=0)


class Pieces(io.StringIO):
    """What is written, piece by piece."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)


def test_text_is_streamed_and_told(model, tokenizer):
    """Fails if the text is not that of the tokens, or comes all at once."""
    out, log = Pieces(), io.StringIO()
    text = complete(model, tokenizer, Request("import os\n", 24, GREEDY), out, log)
    prompt = np.append(tokenizer.document, tokenizer.encode("import os\n"))[None]
    tokens = generate_tokens(model, prompt, 24, GREEDY)[0].tolist()
    tokens = tokens[: tokens.index(tokenizer.document)] if tokenizer.document in tokens else tokens
    assert text == tokenizer.decode(tokens)
    assert out.getvalue() == text + "\n"
    assert sum(bool(piece) for piece in out.pieces) > 5
    assert re.fullmatch(
        r"read 11 tokens at [\d,]+ tokens/s, wrote \d+ at [\d,.]+ tokens/s \(compiled.*\).*\n", log.getvalue()
    )


def test_the_end_of_the_document_is_the_end(tokenizer):
    """A model that writes "é", half of one, and ends the document: fails if the half is shown before the end."""
    script = [*tokenizer.encode("é").tolist(), tokenizer.encode("é")[0], tokenizer.document, 5]

    class Scripted(nnx.Module):
        def __call__(self, tokens, segments, state):
            position = segments.positions - 1  # the prompt is the document token and one more
            following = jnp.asarray(script)[jnp.clip(position, 0, len(script) - 1)]
            return jax.nn.one_hot(following, tokenizer.vocab_size), state

        def logits(self, hidden):
            return hidden

        def init_state(self, batch, capacity):
            return ()

        def unrolled(self):
            return self

    out, log = Pieces(), io.StringIO()
    text = complete(Scripted(), tokenizer, Request("x", 50, GREEDY), out, log)
    assert text == "é\ufffd"
    assert [piece for piece in out.pieces if piece] == ["é", "\ufffd\n"]
    assert "wrote 4 " in log.getvalue()
    assert "the document ended" in log.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 10), "the prompt is empty"),
        (("a", 0), "max_tokens is 0"),
        (("a", 2**31), "max_tokens is 2147483648; give a number from 1 to 21"),
        (("a", 10**30), "max_tokens is 1000"),
        (("a", 10, GREEDY, -1), "seed is -1"),
        (("a", 10, GREEDY, 2**32), "seed is 4294967296"),
    ],
)
def test_requests_that_cannot_be(arguments, message):
    with pytest.raises(UsageError, match=message):
        Request(*arguments)


def test_a_state_that_no_memory_holds_is_refused(model, tokenizer, monkeypatch):
    """Fails when the state is asked for first: the process is killed, or there is a traceback."""
    with pytest.raises(UsageError, match=r"max_tokens is 2,000,000,000, .* would take [\d,.]+ GiB, and the memory is"):
        complete(model, tokenizer, Request("a", 2 * 10**9))
    with pytest.raises(UsageError, match=r"more than the 2,147,481,600 that a document can have"):
        complete(model, tokenizer, Request("abc", 2**31 - 2**11 - 1))


def test_seeds_of_draws_have_32_bits(model, tokenizer):
    for seed in (-1, 2**32):
        with pytest.raises(UsageError, match=f"seed is {seed};"):
            generate_tokens(model, np.array([[1, 2]]), 2, GREEDY, seed)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command's main with flags, on a folder that holds no run."""
    monkeypatch.setattr(commands, "workdir", lambda: tmp_path / "run")

    def run(*arguments):
        with flagsaver.flagsaver():
            flags.FLAGS(["generate", *arguments])
            generate.main()

    return run


def test_prompt_flags(command, tmp_path):
    """Each fails with a sentence, and before a model is looked for."""
    binary, latin, nul = (tmp_path / name for name in ("binary", "latin", "nul"))
    binary.write_bytes(bytes(range(256)))
    latin.write_bytes("café".encode("latin-1"))
    nul.write_bytes(b"a\0b")
    (tmp_path / "empty").touch()
    for arguments, message in (
        ((), "neither --prompt nor --prompt_file is given"),
        (("--prompt=a", f"--prompt_file={nul}"), "both --prompt and --prompt_file are given"),
        (("--prompt=",), "the prompt is empty"),
        ((f"--prompt_file={tmp_path / 'empty'}",), "the prompt is empty"),
        ((f"--prompt_file={tmp_path / 'none'}",), "cannot be read"),
        ((f"--prompt_file={tmp_path}",), "cannot be read"),
        ((f"--prompt_file={binary}",), "is not UTF-8"),
        ((f"--prompt_file={latin}",), "is not UTF-8"),
        ((f"--prompt_file={nul}",), "is not text"),
        (("--prompt=a", "--max_tokens=0"), "max_tokens is 0"),
        (("--prompt=a", "--temperature=-1"), "temperature is -1"),
        (("--prompt=a", "--top_p=0"), "top_p is 0"),
        (("--prompt=a",), "does not exist"),  # all is well but the workdir
    ):
        with pytest.raises(UsageError, match=message):
            command(*arguments)


def test_prompt_files(command, tmp_path, monkeypatch):
    """A byte order mark is no text; what has no end, or is too long, is not read."""
    prompts = []
    monkeypatch.setattr(generate, "Request", lambda prompt, *_: prompts.append(prompt) or Request(prompt))
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfhello")
    with pytest.raises(UsageError, match="does not exist"):
        command(f"--prompt_file={tmp_path / 'marked'}")
    assert prompts == ["hello"]
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**28 + 1)
    for path, message in (
        ("/dev/zero", "no regular file"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "large", "has 268,435,457 bytes; give a file of at most 268,435,456"),
        ("x" * 5000, "cannot be read"),
        ("~nobody_of_this_name/prompt", "no file can be"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            command(f"--prompt_file={path}")
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_consoles_that_cannot_show_a_character(monkeypatch, encoding):
    """Fails with a traceback when the text written has a character that the console has not."""
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", ["generate"])
    with pytest.raises(SystemExit) as end:
        commands.run(lambda: print("né 漢"))
    assert not end.value.code
    console.flush()
    shown = {"ascii": b"n\\xe9 \\u6f22\n", "latin-1": b"n\xe9 \\u6f22\n"}
    assert console.buffer.getvalue() == shown[encoding]


@pytest.mark.parametrize("module", ["generate", "evaluate"])
def test_commands_end_with_a_sentence_and_code_2(module, tmp_path):
    arguments = [f"--workdir={tmp_path / 'none'}", *(["--prompt=a"] if module == "generate" else [])]
    done = subprocess.run(
        [sys.executable, "-m", f"longctx.{module}", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: --workdir=.*none does not exist;.*\n", done.stderr)
