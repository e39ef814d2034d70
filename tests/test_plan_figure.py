"""The plan's picture: what it draws is read back from the axes."""

import numpy as np
import pytest

from bigbatch.commands.plan_figure import draw_plan
from bigbatch.schedule.plan import make_plan
from bigbatch.schedule.policy import cosine, step_decay
from bigbatch.schedule.transform import grow_batch

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
