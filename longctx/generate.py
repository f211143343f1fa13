"""Writes on from a prompt with a trained model.

    python -m longctx.generate --workdir=runs/quickstart --prompt="import os" --max_tokens=100

The text goes to stdout as it is written, the speeds to stderr. With --mesh=1,8,1 eight devices share the caches of
attention to all of the document.
"""

from __future__ import annotations

import jax
from absl import flags

from longctx import commands, config
from longctx.data import files
from longctx.errors import UsageError, refused
from longctx.inference import Request, Sampling, complete
from longctx.parallel import mesh as meshes
from longctx.training import workdir as workdirs

_PROMPT = flags.DEFINE_string("prompt", None, "Text to write on from.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A file with the text to write on from, UTF-8.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 200, "Tokens to write at most; fewer where the model ends the text.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 takes the most likely token.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draws from the most likely tokens that have this mass together.")
_LARGEST = 2**28  # bytes of a prompt file
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws; equal seeds write equal texts.")


def main() -> None:
    sampling = Sampling(_TEMPERATURE.value, _TOP_P.value)
    request = Request(_prompt(), _MAX_TOKENS.value, sampling, _SEED.value)
    run = workdirs.open_run(commands.workdir())
    if run.tokenizer is None:
        raise UsageError(
            f"--workdir={run.path} is of the synthetic task '{run.experiment.data.kind}', whose tokens are numbers and "
            "no text; give a run trained on a corpus."
        )
    mesh = meshes.make(commands.mesh() or config.Mesh(1, 1, 1))
    model, _ = workdirs.load_model(run, mesh)
    with jax.set_mesh(mesh), refused("this model cannot write on this mesh"):
        complete(model, run.tokenizer, request)


def _prompt() -> str:
    text, file = _PROMPT.value, _PROMPT_FILE.value
    if (text is None) == (file is None):
        given = "both --prompt and --prompt_file are" if text is not None else "neither --prompt nor --prompt_file is"
        raise UsageError(f"{given} given; give one of them")
    if file is None:
        return text
    name = f"the prompt file '{file if len(file) <= 120 else file[:120] + '...'}'"
    return files.decode(files.read(files.find(file, "--prompt_file"), name, _LARGEST), name)


if __name__ == "__main__":
    commands.define_workdir()
    commands.define_mesh("one device")
    commands.run(main)
