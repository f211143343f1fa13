"""What every parameter of every registered layer says of itself: what its axes are, and whether it decays.

Nothing is computed: layers are made of shapes.
"""

import dataclasses
import difflib
import functools
import pathlib

import jax
import pytest
from flax import nnx
from laws.cases import LAYERS

from longctx import architecture, config
from longctx.errors import UsageError
from longctx.layers import MIXERS, MLPS
from longctx.layers.attention import Attention
from longctx.layers.basic import Projections
from longctx.layers.positions import Positions
from longctx.models import LanguageModel
from longctx.parallel import rules
from longctx.training import optimizer

D = 32
TABLE = pathlib.Path(__file__).parent / "weight_decay.txt"
KINDS = {**MIXERS, **MLPS}
# The options that the size of an axis of a name follows: at least one of these, and no other axis follows those.
WIDTHS, HEADS, HIDDEN = {"width"}, {"heads", "kv_heads", "index_heads", "groups", "inner"}, {"hidden"}
CHANNELS = {"head_width", "fast_width", "key_width", "value_width", "index_width", "state"}
FOLLOWS = {
    "embed": WIDTHS,
    "width": WIDTHS,
    "heads": HEADS | HIDDEN,
    "mlp": HIDDEN,
    "head": CHANNELS | HIDDEN,
    "block": CHANNELS | HIDDEN | WIDTHS,
    "block_out": CHANNELS | HIDDEN,
    "rank": {"rank", "gate_rank", "step_rank"},
    "taps": {"conv_width", "compressed", "factor", "persistent", "vectors"},
}
FIXED = {"taps", None}  # axes whose size may be a constant
INNER_WIDTH = {"multi_resolution"}  # layers that share their own channels, as many as the model's, as others do heads


def parameters(make):
    """`{path: variable}` of the parameters of what `make()` gives, as shapes."""
    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def layer(kind, width=D, **options):
    return _layer(KINDS[kind], width, KINDS[kind].Config(**options))


@functools.cache
def _layer(cls, width, options):
    return parameters(lambda: cls(width, options, nnx.Rngs(params=0)))


def cases(kind):
    """Options of a layer that between them make all of its parameters: those of the laws, and each switch turned."""
    yield {}
    for case, options in LAYERS.values():
        if case == kind:
            yield options
    for field in dataclasses.fields(KINDS[kind].Config):
        if isinstance(field.default, bool):
            yield {field.name: not field.default}
        elif field.name == "conv_width" and not field.default:
            yield {field.name: 4}
    if issubclass(KINDS[kind].Config, Projections.Config):
        yield {"bias": "all", "gate": "channel", "qk_norm": {"kind": "layer", "over": "all", "bias": True}}
        yield {"gate": "head", "qk_norm": {"over": "each"}}
    if kind == "attention":
        yield from ({"positions": _scheme(name)} for name in Positions.kinds)


def _scheme(name):
    """A scheme of positions with its defaults; of options without any, 64."""
    cls = Positions.kinds[name]
    open_fields = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    return cls(**dict.fromkeys(open_fields, 64))


def valid(kind, options):
    try:
        KINDS[kind].Config(**options)
    except UsageError:
        return False
    return True


def every_parameter():
    """`{name: {path: variable}}` of all registered layers, and of the language model around them."""
    found = {}
    for kind in sorted(KINDS):
        found[kind] = {}
        for options in cases(kind):
            if valid(kind, options):
                found[kind] |= layer(kind, **options)
    block = architecture.Block(
        Attention.Config(), MLPS["relu2"].Config(), norm=architecture.Norm(bias=True), residual="sandwich"
    )
    options = config.Model(("a",), {"a": block}, width=D, embedding=architecture.Embedding(tied=False, bias=True))
    model = parameters(lambda: LanguageModel(options, 64, nnx.Rngs(params=0)))
    found["language_model"] = {path: v for path, v in model.items() if ".mixer." not in path and ".mlp." not in path}
    return found


def test_weight_decay_is_decided_for_every_parameter():
    """The committed table says for every parameter whether weight decay reaches it; what the optimiser does is that.

    Seen to fail: decay by the number of axes, as it once was; a parameter added to a layer.
    """
    lines = []
    for name, variables in every_parameter().items():
        state = nnx.from_flat_state({tuple(path.split(".")): v for path, v in variables.items()})
        decays = {
            ".".join(key.key for key in path): flag
            for path, flag in jax.tree.leaves_with_path(optimizer.decayed(nnx.State(state)))
        }
        lines.append(name)
        for title, wanted in (("decays:", True), ("stays: ", False)):
            paths = sorted(path for path, flag in decays.items() if flag is wanted)
            lines += [f"  {title} {' '.join(paths)}".rstrip()]
    expected = TABLE.read_text().splitlines()
    found = lines
    if found != expected:
        pytest.fail(
            "parameters and tests/weight_decay.txt differ; say `decays=True` where a matrix that multiplies "
            "activations is made, and write the lines marked + into the table:\n"
            + "\n".join(difflib.unified_diff(expected, found, lineterm="", n=1))
        )


def followed(kind):
    """`[(path, variable, for each axis the options that its size follows)]`: found by doubling them one by one."""
    found = {}
    for options in filter(functools.partial(valid, kind), cases(kind)):
        base = {(path, v.get_metadata().get("axes")): v for path, v in layer(kind, **options).items()}
        if found.keys() >= base.keys():
            continue
        others = {"width": layer(kind, 2 * D, **options)} | {
            name: layer(kind, **options | more) for name, more in doubled(kind, options)
        }
        for (path, axes), variable in base.items():
            _, _, sizes = found.setdefault((path, axes), (path, variable, [set() for _ in variable.shape]))
            for name, other in others.items():
                same = path in other and len(other[path].shape) == len(variable.shape)
                for axis in range(len(sizes) if same else 0):
                    if other[path].shape[axis] != variable.shape[axis]:
                        sizes[axis].add(name)
    return found.values()


def doubled(kind, options):
    """`(name, options)` with one of a layer's numbers doubled, and where it cannot be so alone, what it must divide."""
    given = KINDS[kind].Config(**options)
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if type(value) is not int or value < 1:
            continue
        for partner in (None, "heads", "kv_heads", "hidden"):
            more = {field.name: 2 * value} | ({partner: 2 * getattr(given, partner, 0)} if partner else {})
            if (partner is None or hasattr(given, partner)) and valid(kind, options | more):
                yield field.name, more
                break


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_axes_are_named_by_what_they_are(kind):
    """Every axis has a name of `RULES`, or None, and its size follows the options that such an axis does.

    The names say which devices hold what: a wrong one splits what an op takes for whole, or leaves whole what could be
    split. Seen to fail: an MLP's "mlp" on a mixer's heads, "embed" on them, a misspelt name, a name too few.
    """
    for path, variable, sizes in followed(kind):
        axes = variable.get_metadata().get("axes")
        where = f"{kind}.{path} of shape {variable.shape}"
        assert axes is not None, f"{where} has no axes; give nnx.Param(..., axes=(...)) a name for each dimension"
        assert len(axes) == len(variable.shape), f"{where} has the axes {axes}; name each dimension once"
        if path.startswith(("mixers.", "mlps.")):
            continue  # other layers, tested by themselves
        for axis, options in zip(axes, sizes, strict=True):
            assert axis is None or axis in rules.RULES, f"{where}: '{axis}' is not one of {', '.join(rules.RULES)}"
            follows = f"{where}: the size of the axis '{axis}' follows {', '.join(sorted(options)) or 'no option'}"
            allowed = FOLLOWS.get(axis, options) | (WIDTHS if kind in INNER_WIDTH else set())
            assert options & allowed or (axis in FIXED and not options), (
                f"{follows}, where it should one of {', '.join(sorted(allowed))}"
            )
            assert axis not in ("heads", "mlp") or (axis == "mlp") == (kind in MLPS), (
                f"{follows}; in a mixer such an axis is 'heads', in an MLP 'mlp'"
            )
            for names, owned in ((("embed", "width", "block"), WIDTHS), (("heads", "block", "block_out"), HEADS)):
                mine = axis in names or not options & owned or (kind in INNER_WIDTH and owned is WIDTHS)
                assert mine, f"{follows}; such an axis is named {' or '.join(names)}"
