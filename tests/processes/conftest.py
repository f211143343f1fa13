"""Two processes of four simulated devices each, which speak to each other over gloo, as two hosts would."""

import os
from pathlib import Path

import numpy as np
import pytest
from two import Processes

import longctx

ROOT = Path(longctx.__file__).parents[1]
FLAGS = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
FILES = {
    "hybrid.py": """
from ml_collections import ConfigDict

def get_config():
    mlp = {"kind": "swiglu", "hidden": 16}
    attention = {"kind": "attention", "heads": 2, "kv_heads": 2, "head_width": 8}
    delta = {"kind": "gated_delta", "heads": 2, "key_width": 8, "value_width": 8}
    mixers = {"delta": delta, "local": attention | {"pattern": "Window(16)"}, "full": attention}
    return ConfigDict({
        "model": {
            "width": 16,
            "pattern": tuple(mixers),
            "blocks": {name: {"mixer": mixer, "mlp": mlp} for name, mixer in mixers.items()},
        },
        "training": {"stages": ((30, 4, 64),), "learning_rate": 3e-3, "warmup_steps": 5},
        "data": {"path": "documents", "tokenizer": "bytes", "needles": {"rows": 0.5, "facts": 2}},
        "mesh": {"data": 1},
        "checkpoints": {"every": 15},
    })
""",
    "small.py": """
from ml_collections import ConfigDict

def get_config():
    mixer = {"kind": "gla", "heads": 2, "key_width": 8, "value_width": 8}
    return ConfigDict({
        "model": {
            "width": 16,
            "pattern": ("only",),
            "blocks": {"only": {"mixer": mixer, "mlp": {"kind": "swiglu", "hidden": 16}}},
        },
        "training": {"stages": ((3, 4, 32), (200, 2, 64)), "warmup_steps": 2, "log_every": 3},
        "data": {"path": "documents", "tokenizer": "bytes", "needles": {"rows": 0.5, "facts": 2}},
        "mesh": {"data": 2, "context": 4},
        "checkpoints": {"every": 5, "keep": 2},
        "evaluation": {"factors": (1,), "depths": 1, "samples": 1, "final_block": 8, "documents": 2},
    })
""",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with the experiments, and twelve documents of pseudo-random letters."""
    folder = tmp_path_factory.mktemp("processes")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "documents").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / "documents" / f"{i}.txt").write_text("".join(rng.choice(list("abcd ef\n"), 300 + 50 * i)))
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": FLAGS,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture
def start(folder, environment):
    """`start(program, *arguments, prepare=...)`: two processes of `python program --coordinator=... arguments`."""
    begun = []

    def start(program, *arguments, **options):
        flags = ["--coordinator=localhost:{port}", "--num_processes=2"]
        commands = [[*program, *flags, f"--process_id={index}", *arguments] for index in range(2)]
        begun.append(Processes(folder, environment, commands, **options))
        return begun[-1]

    yield start
    for processes in begun:
        processes.kill()
