"""What a device sends in a training step, layer by layer and scheme by scheme, read off the compiled programs.

    python benchmarks/communication.py --write

Layers have width 64 and default options; one row, of which every device has a share; `context` is the mesh's only axis.
Nothing is run: programs are compiled for simulated devices, and their collectives counted, those in loops as often as
the loop runs. What a program says is kept in a file of results, and not compiled again, so that a run can be stopped
and go on. With --write the tables replace benchmarks/communication.md.

With --topology, which needs `pip install -e '.[tpu]'` but no TPU, a few layers are compiled for it, too, and their
schedules tell what a device does while a message is on its way; a name is a TPU's, such as v5p:2x2x1.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import time
from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple

if __name__ == "__main__":  # before jax starts; the back end's optimisations take time and move no byte
    FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
    if metadata.version("jaxlib").startswith("0.10."):  # an unknown flag ends the process
        FLAGS += " --xla_cpu_use_fusion_emitters=false"
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import config
from longctx.layers import MIXERS, MLPS
from longctx.parallel import mesh
from longctx.planning import programs
from longctx.typing import Segments

WIDTH, SHARE = 64, 256  # tokens of the shorter rows on each device
NAMES = [*MIXERS, "inplace_ttt"]
# Layers whose schedules are shown, about as large as those of experiments/hybrid_1b_1m.py, and tokens on each device.
OVERLAPPED = {
    "gated_delta": {"heads": 16, "key_width": 64, "value_width": 128},
    "mamba2": {"heads": 32, "key_width": 128, "value_width": 128},
    "attention": {"heads": 16, "kv_heads": 8, "head_width": 128},
}
OVERLAPPED_WIDTH, OVERLAPPED_SHARE = 2048, 8192
SMALL = 1024  # bytes; what is less, such as the ids of an edge, has nothing to hide
# By the function in whose course a message is sent: the innermost that is here counts.
SCHEMES = {
    "exclusive": "scan",
    "entering": "scan",  # states of these sizes do not go by the relay
    "pass_on": "relay",
    "last": "halo",
    "_in_turn": "in turn",
    "_by_residue": "residues",
    "_keys_seen": "gather",
    "_all_before": "gather",
}
FILES = {"ring.py": "ring", "cope.py": "ring", "lsh.py": "ring", "path.py": "ring", "chosen.py": "chosen blocks"}
FILES |= {"ulysses.py": "heads", "gather.py": "gather"}


def compiled(name: str, length: int, devices: list[jax.Device], width: int = WIDTH, **options) -> str:
    """The program of loss and gradients of a layer on one row over the devices, as text."""
    cls = MIXERS.get(name) or MLPS[name]
    graph, params = nnx.split(nnx.eval_shape(lambda: cls(width, cls.Config(**options), nnx.Rngs(params=0))))

    def loss(params, x, segments):
        return jnp.sum(jnp.square(nnx.merge(graph, params)(x, segments)[0]))

    with jax.set_mesh(mesh.make(config.Mesh(1, len(devices), 1), devices)) as _:
        ambient = jax.sharding.get_mesh()

        def described(tree, spec):
            place = jax.sharding.NamedSharding(ambient, spec)
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

        row = described(jax.eval_shape(lambda: Segments.single(1, length)), jax.P(None, "context"))
        x = described(jax.ShapeDtypeStruct((1, length, width), jnp.float32), jax.P(None, "context"))
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return step.lower(described(nnx.as_pure(params), jax.P()), x, row).compile().as_text()


class Message(NamedTuple):
    """A collective: its kind, for what and in which pass it is, and what each of its senders sends."""

    kind: str
    scheme: str
    way: str
    bytes: int
    senders: Sequence[int]


def messages(text: str, devices: int) -> list[Message]:
    """Every message of a program, those in loops as often as they are sent, of branches those that send most.

    Where how often a loop runs depends on the data, one round of it counts, and the schemes of its messages say so.
    """
    functions = _functions(text)

    def message(run: programs.Run) -> Message:
        kind, rest = run.instruction.op.removesuffix("-start"), run.instruction.rest
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", rest)
        senders = [int(n) for n in re.findall(r"\{(\d+),", pairs[1])] if pairs else range(devices)
        frame = re.search(r"stack_frame_id=(\d+)", rest)
        scheme = "sums" if kind in ("all-reduce", "reduce-scatter") else _scheme(functions(frame and int(frame[1])))
        way = "backward" if "transpose(" in rest else "forward"
        return Message(kind, f"{scheme} (a round)" if run.open else scheme, way, round(run.amount), senders)

    return [message(run) for run in programs.messages(text, devices) for _ in range(run.times)]


def _functions(text: str):
    """`f(frame) -> [(file, function), ...]`, innermost first, from the tables at the head of a program."""

    def table(title):
        lines = text.partition(f"\n{title}\n")[2].partition("\n\n")[0].splitlines()
        return {int(number): rest for number, rest in (line.split(" ", 1) for line in lines)}

    files, names, places, frames = map(table, ("FileNames", "FunctionNames", "FileLocations", "StackFrames"))

    def field(line, name):
        return int(re.search(rf"{name}=(\d+)", line)[1])

    def functions(frame):
        found = []
        while frame in frames:
            place = places[field(frames[frame], "file_location_id")]
            file = files[field(place, "file_name_id")].strip('"')
            found.append((pathlib.Path(file).name, names[field(place, "function_name_id")].strip('"')))
            parent = field(frames[frame], "parent_frame_id") - 1  # 0 is none
            frame = parent if parent != frame else None
        return found

    return functions


def _scheme(functions: list[tuple[str, str]]) -> str:
    for file, function in functions:
        name = function.split(".")[0]
        if name in SCHEMES or file in FILES:
            return SCHEMES.get(name) or FILES[file]
    return "the compiler"


def counted(name: str, length: int, devices: int) -> dict:
    """Bytes that the device which sends most sends in a step: in all, in the forward pass, and by scheme."""
    found = messages(compiled(name, length, jax.devices()[:devices]), devices)

    def of(device: int, *, scheme: str | None = None, way: str | None = None) -> int:
        chosen = (m for m in found if device in m.senders and m.scheme == (scheme or m.scheme))
        return sum(m.bytes for m in chosen if (m.scheme != "sums" or scheme) and m.way == (way or m.way))

    most = max(range(devices), key=of)
    schemes = {scheme: of(most, scheme=scheme) for scheme in sorted({m.scheme for m in found} - {"sums"})}
    gathers = [m.bytes for m in found if m.kind in ("all-gather", "all-to-all")]
    forward = max(of(device, way="forward") for device in range(devices))
    sums = of(most, scheme="sums")
    return {"step": of(most), "forward": forward, "schemes": schemes, "sums": sums, "gather": max(gathers, default=0)}


def under_way(name: str, topology: str) -> dict:
    """Messages by their pass and by what the schedule has between their start and their end."""
    from jax.experimental import topologies

    devices = list(topologies.get_topology_desc(topology, platform="tpu").devices)
    text = compiled(name, OVERLAPPED_SHARE * len(devices), devices, OVERLAPPED_WIDTH, **OVERLAPPED[name])
    large = {run.instruction.name for run in programs.messages(text, len(devices)) if run.amount >= SMALL}
    computations, entry = programs.parse(text)
    lines = list(computations[entry].values())
    starts = {line.name: at for at, line in enumerate(lines) if line.op == "collective-permute-start"}
    total = {f"{way} {what}": 0 for way in ("forward", "backward") for what in ("loop", "fusion", "nothing")}
    for at, line in enumerate(lines):
        if line.op == "collective-permute-done":
            start = starts[re.match(r"%?([\w.\-]+)", line.rest)[1]]
            if lines[start].name not in large:
                continue
            between = {line.op for line in lines[start + 1 : at]}
            way = "backward" if "transpose(" in lines[start].rest else "forward"
            total[f"{way} {'loop' if 'while' in between else 'fusion' if 'fusion' in between else 'nothing'}"] += 1
    return total


def measure(names: list[str], topology: str | None, results: pathlib.Path) -> dict:
    """All cells of the named layers, from the file of results or compiled now and appended to it."""
    cells = dict(map(json.loads, results.read_text().splitlines())) if results.exists() else {}
    sizes = ((4, SHARE), (4, 4 * SHARE), (8, SHARE))
    jobs = [(f"{name} {p} {p * share}", counted, (name, p * share, p)) for p, share in sizes for name in names]
    jobs += [(f"{name} {topology}", under_way, (name, topology)) for name in OVERLAPPED if topology and name in names]
    jobs = [job for job in jobs if job[0] not in cells]
    begin = time.perf_counter()
    for number, (key, function, arguments) in enumerate(jobs, 1):
        cells[key] = function(*arguments)
        jax.clear_caches()
        left = (time.perf_counter() - begin) / number * (len(jobs) - number) / 60
        print(f"[{number}/{len(jobs)}, some {left:.0f} min left] {key}: {cells[key]}", flush=True)
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps([key, cells[key]]) + "\n")
    return cells


def report(names: list[str], topology: str | None, cells: dict) -> str:
    """The tables in Markdown.

    Raises:
      AssertionError: a layer sends the same bytes whatever T, and yet gathers the sequence.
    """
    rows, bounded = [], []
    for name in names:
        short, long, wide = (cells[f"{name} {p} {p * share}"] for p, share in ((4, SHARE), (4, 4 * SHARE), (8, SHARE)))
        if short["step"] == long["step"]:
            assert long["gather"] < 4 * 4 * SHARE, f"{name} gathers {long['gather']} bytes"
            bounded.append(name)
        schemes = ", ".join(f"{scheme} {size:,}" for scheme, size in short["schemes"].items() if size) or "nothing"
        growth = f"{long['step'] / short['step']:.2f}" if short["step"] else "1.00"
        numbers = (short["forward"], short["step"], long["step"], growth, wide["step"], short["sums"])
        rows.append([name, schemes, *(n if isinstance(n, str) else f"{n:,}" for n in numbers)])
    columns = ["layer", "schemes, bytes at 4 x 256", "forward, 4 x 256", "step, 4 x 256", "step, 4 x 1,024", "growth"]
    columns += ["step, 8 x 256", "sums of gradients"]
    text = HEAD + table(columns, rows)
    text += f"\n{len(bounded)} of {len(names)} layers send the same bytes whatever the length of the row, and none of "
    text += "them gathers an array as long as the sequence.\n"
    if topology:
        shown = {name: cells[f"{name} {topology}"] for name in OVERLAPPED if name in names}
        rows = [[name, *map(str, cell.values())] for name, cell in shown.items()]
        columns = ["layer", *next(iter(shown.values()), {})]
        text += OVERLAP.format(topology=topology) + table(columns, rows)
    return text


HEAD = f"""# What a device sends in a training step

By `python benchmarks/communication.py --write`, jax {jax.__version__}. Bytes that one device sends, the one that sends
most, in a step (loss and gradients) and in its forward pass alone, for one row over 4 and 8 devices, each with 256 or
1,024 of its tokens; layers of width {WIDTH} with default options, float32. Read off the compiled programs, messages in
loops as often as they are sent; chosen blocks go in rounds, up to eight, as many as the data need, of which one is
counted each way. A permutation counts its operand, where the device is among the senders; a gather P - 1 shards; an
all-to-all (P - 1) / P of the array; a sum over devices 2 (P - 1) / P of it. The sums, of the gradients of parameters
and of the loss, are in the last column and in no other.

"""

OVERLAP = f"""
## On the way

Messages in the schedule of the same step compiled for {{topology}}, by what the device does between a message's start
and its end: a loop over tokens, else a fused operation, or nothing. The layers have width {OVERLAPPED_WIDTH:,} and
16 or 32 heads (`OVERLAPPED` in the script), and devices {OVERLAPPED_SHARE:,} tokens each; messages of less than
{SMALL:,} bytes are not counted.

"""


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default=",".join(NAMES))
    parser.add_argument("--topology", help="of TPUs that the overlap is shown for, such as v5p:2x2x1")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("runs/communication.jsonl"))
    parser.add_argument("--write", action="store_true", help="replace benchmarks/communication.md")
    arguments = parser.parse_args()
    chosen = arguments.layers.split(",")
    text = report(chosen, arguments.topology, measure(chosen, arguments.topology, arguments.results))
    if arguments.write:
        pathlib.Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
