"""The plan's picture: what it draws is read back from the axes."""

import numpy as np
import pytest

from bigbatch.commands.plan_figure import draw_plan
from bigbatch.schedule.plan import make_plan
from bigbatch.schedule.policy import cosine, step_decay
from bigbatch.schedule.transform import grow_batch
from tests.test_controller import controller, rolled_out

STEPS = step_decay(0.1, 10, 0.9, boundaries_epochs=[2, 4], factor=0.2)
SMOOTH = cosine(0.1, 10, 0.9, until_epoch=6)


@pytest.mark.parametrize("source", [STEPS, SMOOTH])
def test_lines_hold_the_plan(source, drawn, tmp_path):
    before = make_plan(source, train_examples=1000, epochs=6)
    plan = make_plan(grow_batch(source, 200), train_examples=1000, epochs=6)
    draw_plan(tmp_path / "plan.png", plan, before)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    axes = np.array(drawn[0].axes).reshape(4, 2)
    columns = {
        0: plan.hypers["learning_rate"],
        1: plan.batch_sizes,
        2: plan.hypers["momentum"],
        3: plan.noise_scales,
    }
    for row, column in columns.items():
        by_epochs, by_updates = (axis.lines[1] for axis in axes[row])
        x = by_updates.get_xdata()
        assert x[0] == 0
        assert x[-1] == plan.num_updates
        assert by_epochs.get_xdata()[-1] == pytest.approx(plan.num_examples / 1000)
        np.testing.assert_array_equal(by_updates.get_ydata()[:-1], column[x[:-1].astype(int)])
    assert axes[3, 0].lines[0].get_xdata()[-1] == pytest.approx(before.num_examples / 1000)


def test_a_long_plan_is_thinned_out(drawn, tmp_path):
    plan = make_plan(SMOOTH, train_examples=300_000, epochs=6)
    draw_plan(tmp_path / "plan.svg", plan)
    assert plan.num_updates == 180_000
    assert 2000 < len(drawn[0].axes[0].lines[0].get_xdata()) < 10_000


@pytest.mark.parametrize(("batch_size", "scale"), [(50, "linear"), (60, "log")])
def test_the_updates_have_a_logarithmic_axis_where_a_line_is_short(
    drawn, tmp_path, batch_size, scale
):
    """Below a fifth of the longest, and no change of either is lost on the left."""
    large = step_decay(0.1, batch_size, 0.9, boundaries_epochs=[0.2, 0.5], factor=0.2)
    plans = [make_plan(each, train_examples=1000, epochs=1) for each in (large, STEPS)]
    draw_plan(tmp_path / "plan.png", *plans)
    axis = drawn[0].axes[-1]
    assert axis.get_xscale() == scale
    assert axis.get_xlim()[0] < np.argmax(np.diff(plans[0].hypers["learning_rate"]) != 0) + 1
    assert drawn[0].get_suptitle().endswith("updates instead of 100, 1 epoch of 1,000 examples")


def limits_at(area, x):
    """Least and greatest of a shaded area between steps at x."""
    (path,) = area.get_paths()
    pairs = zip(path.vertices[:-1], path.vertices[1:], strict=True)
    found = [y for (x0, y), (x1, end) in pairs if y == end and min(x0, x1) <= x <= max(x0, x1)]
    return min(found), max(found)


def test_adaptive_runs_stay_in_the_band(drawn, tmp_path):
    """Those of which few, some and many measurements ask for growth."""
    adaptive = controller(cooldown_epochs=6)
    draw_plan(tmp_path / "plan.png", adaptive.most_updates(), grown=adaptive.fewest_updates())
    rows = np.array(drawn[0].axes).reshape(4, 2)
    grew = set()
    for noise_scale in (1, 300, 10_000):
        plan, states = rolled_out(adaptive, lambda row, scale=noise_scale: 1 / scale)
        grew.add(len(states[-1].growths))
        columns = {0: plan.hypers["learning_rate"], 1: plan.batch_sizes, 3: plan.noise_scales}
        for update in range(0, plan.num_updates, 11):
            x = (plan.first_examples[update] + 0.5) / plan.train_examples, update + 0.5
            for row, column in columns.items():
                for axis, at in zip(rows[row], x, strict=True):
                    low, high = limits_at(axis.collections[0], at)
                    assert low * (1 - 1e-9) <= column[update] <= high * (1 + 1e-9)
    assert len(grew) == 3
