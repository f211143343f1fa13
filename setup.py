"""Installs longctx: `pip install -e .`, with extras for accelerators, tests, benchmarks and notebooks."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent
REQUIREMENTS = [
    line
    for line in (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]

setuptools.setup(
    name="longctx",
    version="0.1.0",
    description="Long-context language models in JAX: every layer as a definition, a fast form and a sharded form",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["longctx", "longctx.*"]),
    python_requires=">=3.11",
    install_requires=REQUIREMENTS,
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "plan": ["jax[tpu]>=0.10.2,<0.13"],  # libtpu compiles for TPUs on a machine without one
        # The same for GPUs, without CUDA: XLA is in jax-cuda13-pjrt, the kernels of JAX's own operations in the other.
        "plan-gpu": ["jax-cuda13-plugin>=0.10.2,<0.13", "jax-cuda13-pjrt>=0.10.2,<0.13"],
        "test": [
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "nbclient>=0.10,<0.12",
            "nbformat>=5.10,<6",
            "ipykernel>=6.29,<8",
            "ruff>=0.14,<0.18",
        ],
        # Peers to measure against, never imported by longctx.
        "bench": ["torch>=2.8,<3", "transformers>=5,<6"],
    },
)
