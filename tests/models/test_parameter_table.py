"""The table of a model's parameters."""

from test_language import make

from longctx import config
from longctx.models import parameter_count, parameter_table


def test_every_parameter_is_in_one_cell():
    """Rows and columns add up to the model. Seen to fail: a repeated block counted once; a norm left out."""
    model = make(("delta", "full", "full"), repeats=2, embedding={"tied": False})
    training = config.Training((config.Stage(1, 1, 64),))
    table = parameter_table(config.Experiment(model=model.options, training=training), 50)
    rows = {line.split("  ")[0]: line.replace(",", "").split()[-1] for line in table.splitlines()}
    delta, full = "delta: gated_delta, relu2", "full: attention, swiglu"
    assert list(rows) == ["parameters", delta, full, "embedding, and back", "last norm", "all"]
    assert int(rows["all"]) == parameter_count(model)
    assert int(rows["embedding, and back"]) == 2 * 50 * 16
    per_block = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 2 * 8 + 3 * 16 * 256 + 2 * 16
    assert int(rows[full]) == 4 * per_block
    parts = [row for name, row in rows.items() if name not in ("parameters", "all")]
    assert sum(map(int, parts)) == int(rows["all"])
