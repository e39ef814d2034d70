"""A plan against measured critical batch sizes: where it passes them, by how much, what to do."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch import cli
from bigbatch.commands.critical.fit import Fit, Intervals
from bigbatch.commands.critical.limits import Limit, against, later, read
from bigbatch.commands.critical.table import Noise, Point, write
from bigbatch.schedule.plan import make_plan
from bigbatch.schedule.policy import constant, step_decay
from bigbatch.schedule.transform import batch_stages, grow_batch

EXAMPLES = 10_000


def plan():
    """100 examples an update, 400 from epoch 2 on, 1,600 from epoch 4 on, to epoch 6."""
    recipe = step_decay(0.1, 100, 0.9, boundaries_epochs=[2, 4], factor=0.25)
    return make_plan(grow_batch(recipe), train_examples=EXAMPLES, epochs=6)


def limits(*pairs):
    return [Limit(epoch, size, 0.8 * size, 1.5 * size) for epoch, size in pairs]


def by_hand(found, plan):
    """The ratio at each update, in whole numbers of examples."""
    ratios, position = [], 0
    for size in plan.batch_sizes.tolist():
        measured = found[0].examples
        for limit in found:
            if limit.epoch * EXAMPLES <= position:
                measured = limit.examples
        ratios.append((size / measured, position / EXAMPLES))
        position += size
    return ratios


@pytest.mark.parametrize(
    ("pairs", "way_out"),
    [
        (
            ((0.5, 120), (3, 300), (5, 2_000)),
            'let it grow later (batch_stages "0:100 50000_examples:1600", or grow_batch with '
            "from_epoch=5), or set max_batch_size to about 2,000",
        ),
        (((0.5, 120), (3, 300)), "updates saved; set max_batch_size to about 300"),
        (
            ((0.5, 120), (3, 9_000), (5, 700)),
            'later (batch_stages "0:100 30000_examples:400"), or set max_batch_size to about 700',
        ),
        (((1, 50),), "updates saved; set max_batch_size to about 50"),
    ],
)
def test_where_and_by_how_much_a_plan_passes(pairs, way_out):
    found = limits(*pairs)
    told = against(found, plan())
    ratios = by_hand(found, plan())
    assert told.value == pytest.approx(max(ratio for ratio, _ in ratios))
    past = [epoch for ratio, epoch in ratios if ratio > 1]
    assert f"from epoch {past[0]:.4g} to {past[-1]:.4g}, in {len(past):,} updates" in told.warning
    assert way_out in told.warning


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 5.9), st.floats(100, 5_000)),
        min_size=1,
        max_size=5,
        unique_by=lambda pair: pair[0],
    )
)
def test_the_later_stages_stay_below_what_was_measured(pairs):
    found = limits(*sorted(pairs))
    stages = later(found, plan())
    text = " ".join(f"{first}_examples:{size}" if first else f"0:{size}" for first, size in stages)
    recipe = batch_stages(constant(0.1, 100, 0.9), text, train_examples=EXAMPLES)
    late = make_plan(recipe, train_examples=EXAMPLES, epochs=6)
    assert against(found, late).warning is None
    # None of them is later than it need be.
    for first, size in stages[1:]:
        before = [limit for limit in found if limit.epoch * EXAMPLES <= first - 1]
        assert not before or min(limit.examples for limit in found[len(before) - 1 :]) < size


def test_a_plan_below_them_all_is_not_warned_of():
    told = against(limits((0, 150), (2, 900), (3.9, float("inf"))), plan())
    assert told.warning is None
    assert told.value == pytest.approx(100 / 150)
    assert "100 of 150 examples (95 % interval 120 to 225)" in told.text


def point(epoch, size):
    fit = Fit(100.0, 1.0, 100.0 * size, 1.0, size, 1.0) if size else None
    low_and_high = (0.8 * size, float("inf")) if size else None
    return Point(
        update=int(10 * epoch),
        epoch=epoch,
        batch_size=32,
        learning_rate=0.1,
        noise=Noise(1.0, None, None, "not positive"),
        target_loss=0.5,
        sizes=(),
        fit=fit,
        intervals=Intervals((1.0, 2.0), (1.0, 2.0), low_and_high) if size else None,
    )


def test_what_critical_has_written_is_read(tmp_path):
    write([point(4.0, float("inf")), point(1.5, 200.0), point(0.5, None)], tmp_path)
    unlimited = float("inf")
    expected = [Limit(1.5, 200, 160, unlimited), Limit(4, unlimited, unlimited, unlimited)]
    assert read(str(tmp_path / "critical.json")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no checkpoint has a fit"),
        ("{", "Expecting"),
        ('{"epoch": 1}', "it: {'epoch': 1} is no list"),
        ('[{"update": 1}]', "epoch is missing"),
        ('[{"epoch": 1, "fit": 3}]', "has written"),
        ('[{"epoch": 1, "fit": {"critical_batch_size": "x"}, "intervals": {}}]', "has written"),
        (None, "there is no such file"),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, text, message):
    path = tmp_path / "critical.json"
    if text is not None:
        path.write_text(text)
    assert cli.main(["plan", "--config=digits:increase", f"--critical={path}"]) == 2
    error = capsys.readouterr().err
    assert f"critical: given {str(path)!r}" in error
    assert message in error


@pytest.mark.parametrize("experiment", ["increase", "adaptive"])
def test_the_command_warns(tmp_path, capsys, experiment):
    write([point(1.0, 100.0)], tmp_path)
    asked = ["plan", f"--config=digits:{experiment}", f"--critical={tmp_path}/critical.json"]
    assert cli.main(asked) == 0
    out = capsys.readouterr().out
    assert "critical batch size: at most 3.2 times the measured one" in out
    assert "warning: from epoch" in out
    assert cli.main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["critical"]
    assert told["value"] == pytest.approx(3.2)
