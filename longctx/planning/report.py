"""What a step takes on devices that are not here, in numbers, in words, and what to change where it does not fit.

The time is bounded from below by what a device must at least do, each at its published peak: its share of the matrix
products, in bfloat16 passes; reads and writes of its memory, as the compiled program has them; and the bytes that its
collectives send. The operations of the model, those done again left out, over that time and the peak are the most that
can be utilised. A measurement will be below. For GPUs in several hosts all bytes are assumed to cross the network, so
that the time of the links is an estimate there, and no bound where a host keeps them. The reads of a loop that ends at
run time are those of rows of one document.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from longctx import config
from longctx.planning.chips import GIB, NETWORK, Chip

_UNITS = {"TiB": 2**40, "GiB": GIB, "MiB": 2**20, "KiB": 2**10}
_OF_GPUS = (
    "Kernels of the GPU's libraries (cuDNN) are not in this plan, nor which of its own XLA finds to be fastest there. "
    "Attention is blockwise, as in training: cuDNN's takes no packed rows. JAX uses three quarters of a GPU's memory, "
    "unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."
)
_BETWEEN_HOSTS = (
    f"The time of the links assumes a network of {8 * NETWORK / 1e9:.0f} Gb/s for each GPU and all bytes to cross it, "
    "though NVLink carries what stays within a host."
)


@dataclasses.dataclass(frozen=True)
class Report:
    """Of one step of training.

    Attributes:
      config: the experiment's name.
      topology: its name.
      devices: that the mesh uses, each one `device`.
      hosts: of GPUs; 0 of TPUs.
      mesh: devices along each axis.
      experiment, stage: what was compiled.
      parameters: of the model, numbers.
      bytes_per_device: by use, and "total".
      moved: bytes that a device reads from its memory and writes to it; None if the program does not fit.
      collectives: bytes that a device sends, by kind; None if the program does not fit.
      flops_per_step: of the model's matrix products, in whole rows and nothing computed again.
      flops_done: of the program's, on all devices together: with what it computes again or on several devices alike,
        in the chunks that its shards of a row have.
      passes: of the program's, in products of bfloat16 that the hardware makes.
      compile_seconds: that this took.
    """

    config: str
    topology: str
    devices: int
    device: Chip
    mesh: dict[str, int]
    experiment: config.Experiment
    stage: config.Stage
    parameters: int
    bytes_per_device: dict[str, int]
    moved: int | None
    collectives: dict[str, int] | None
    flops_per_step: float
    flops_done: float
    passes: float
    compile_seconds: float
    hosts: int = 0

    @property
    def fits(self) -> bool:
        """Whether there is room for all of it."""
        return self.collectives is not None and self.bytes_per_device["total"] <= self.device.memory

    @property
    def seconds(self) -> dict[str, float]:
        """The least that a step takes, by what it is bounded; of a program that does not fit by `compute` alone."""
        found = {"compute": self.passes / self.devices / self.device.flops}
        if self.collectives is not None:
            found["memory"] = self.moved / self.device.bandwidth
            found["links"] = sum(self.collectives.values()) / self.device.links
        return found

    @property
    def utilisation(self) -> float:
        """The most of the devices' peak that the model can use."""
        return self.flops_per_step / self.devices / self.device.flops / max(self.seconds.values())

    @property
    def tokens_per_step(self) -> int:
        """Of a batch, over all devices."""
        return self.stage.batch * self.stage.length

    def json(self) -> dict[str, Any]:
        """All of it, for a file."""
        found = {name: getattr(self, name) for name in ("config", "topology", "devices", "mesh", "fits", "parameters")}
        found |= {"batch": self.stage.batch, "length": self.stage.length, "tokens_per_step": self.tokens_per_step}
        found |= {"bytes_per_device": self.bytes_per_device, "hbm_per_device": self.device.memory}
        found |= {
            "bytes_moved": self.moved,
            "collectives": self.collectives,
            "flops_per_step": self.flops_per_step,
            "flops_done": self.flops_done,
        }
        found |= {"mxu_passes": self.passes, "roofline_seconds": self.seconds, "utilisation_bound": self.utilisation}
        return found | {"changes": self.changes(), "compile_seconds": round(self.compile_seconds, 1)}

    def changes(self) -> list[str]:
        """What to change, where it does not fit: fields of the experiment, the cheapest first."""
        if self.fits:
            return []
        training, model, held = self.experiment.training, self.experiment.model, self.bytes_per_device
        found = []
        if held["parameters"] + held["optimizer"] > self.device.memory / 2:
            found.append(
                f"mesh.model={2 * self.mesh['model']}, or more devices: parameters and optimiser take "
                f"{(held['parameters'] + held['optimizer']) / GIB:.1f} GiB of each"
            )
        if model.remat != "full":
            found.append(f"model.remat='full' in place of '{model.remat}': keeps the inputs of the blocks alone")
        rows = self.stage.batch // training.accumulate // self.mesh["data"]
        if rows > 1:
            found.append(
                f"training.accumulate={training.accumulate * rows}: each device then works on one row at a time, "
                f"not on {rows}"
            )
        elif self.mesh["data"] > 1:
            found.append(
                f"mesh.context={2 * self.mesh['context']} and training.accumulate={2 * training.accumulate}: "
                "each device then holds half as many tokens of a row"
            )
        else:
            found.append(f"more devices along mesh.context than {self.mesh['context']}, or shorter rows")
        if model.dtype == "float32":
            found.append("model.dtype='bfloat16': activations take half")
        return found

    def text(self) -> str:
        """The report in Markdown."""
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        verdict = "**It fits.**" if self.fits else "**It does not fit.**"
        lines = [
            f"# {self.config} on {self.topology}",
            "",
            f"One step of training, {self.stage.batch:,} rows of {self.stage.length:,} tokens, {self.parameters:,} "
            f"parameters, over {self.devices} devices ({mesh}), compiled on a machine without any of them in "
            f"{self.compile_seconds:,.0f} s. {verdict}",
            "",
            "| on each device | bytes |",
            "| --- | ---: |",
            *(f"| {name} | {_readable(size)} |" for name, size in self.bytes_per_device.items()),
            f"| HBM of the device | {_readable(self.device.memory)} |",
            "",
        ]
        if self.collectives is not None:
            lines += [
                "| collective | bytes that a device sends |",
                "| --- | ---: |",
                *(f"| {kind} | {_readable(size)} |" for kind, size in self.collectives.items()),
                "",
                f"A device reads and writes {_readable(self.moved)} of its memory.",
                "",
            ]
        lines += [
            "| at its peak, at least | seconds |",
            "| --- | ---: |",
            *(f"| {what} | {seconds:.3g} |" for what, seconds in self.seconds.items()),
            "",
            f"The matrix products of the model, in whole rows and each made once, are {self.flops_per_step:.3g} "
            f"operations; those of this program, on all devices together, {self.flops_done:.3g}"
            f"{_share(self.flops_done, self.flops_per_step)}. They take bfloat16 units as long as {self.passes:.3g}. "
            f"At most {self.utilisation:.0%} of the devices' peak can be utilised: a bound, not a measurement.",
        ]
        if self.hosts:
            lines += ["", _OF_GPUS]
        if self.hosts > 1:
            lines += ["", _BETWEEN_HOSTS]
        lines += ["", "To change, where it does not fit:", ""] * bool(self.changes())
        lines += [f"- {change}" for change in self.changes()]
        return "\n".join(lines) + "\n"


def _share(done: float, model: float) -> str:
    """Why a program does more than its model, or less."""
    more = done / model - 1
    if more >= 0.0005:
        return f", {more:.1%} more: what is computed again, or on several devices alike"
    if more <= -0.0005:
        return f", {-more:.1%} less: shards of a row are cut into shorter chunks"
    return ""


def _readable(size: int) -> str:
    """Bytes with a unit."""
    unit = next((unit for unit in _UNITS if size >= _UNITS[unit]), None)
    return f"{size / _UNITS[unit]:,.2f} {unit}" if unit else f"{size} B"
