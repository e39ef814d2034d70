"""Other trainers' schedules: what is written against simulators that share no code with it."""

import dataclasses
import math
import random

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings

from bigbatch import cli
from bigbatch.config.config import read_config
from bigbatch.errors import UserError
from bigbatch.schedule.plan import make_plan
from bigbatch.schedule.policy import (
    batch_ramp,
    constant,
    cosine,
    polynomial,
    stages,
    step_decay,
    warmup,
)
from bigbatch.schedule.trainers import levanter, maxtext, megatron, olmo_core
from bigbatch.schedule.transform import adam, grow_batch, raise_momentum, with_rule
from tests import trainer_simulators as simulators
from tests.recipes import EPOCHS, recipes

LENGTH = 8
SIMULATED = {
    "csv": simulators.table,
    "json": simulators.columns,
    "pytorch": simulators.pytorch,
    "optax": simulators.optax,
    "megatron": simulators.megatron,
    "megatron_rampup": simulators.megatron,
    "levanter": simulators.levanter,
    "maxtext": lambda text: simulators.maxtext(text, 1),
    "olmo_core": lambda text: simulators.olmo_core(text, LENGTH),
}


def rows_of(plan):
    """(batch size, learning rate, momentum) an update."""
    columns = plan.batch_sizes, plan.hypers["learning_rate"], plan.hypers["momentum"]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def assert_same(rows, expected):
    """Batch sizes exactly, the rest but for rounding in their formulas."""
    assert len(rows) == len(expected)
    ours, theirs = np.array(rows), np.array(expected)
    np.testing.assert_array_equal(ours[:, 0], theirs[:, 0])
    peak = theirs[:, 1].max()
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=1e-9, atol=1e-12 * peak)
    np.testing.assert_array_equal(ours[:, 2], theirs[:, 2])


def largest_error(plan, rows, column):
    """At each first example of the plan, by a walk through the other's updates."""
    worst, at, end = 0.0, -1, 0
    values = plan.batch_sizes if column == 0 else plan.hypers["learning_rate"]
    for first, value in zip(plan.first_examples.tolist(), values.tolist(), strict=True):
        while end <= first and at + 1 < len(rows):
            at += 1
            end += rows[at][0]
        worst = max(worst, abs(rows[at][column] - value) / (value or values.max()))
    return worst


def small(recipe):
    """Its plan, if it is a short one: each is walked through in Python, ten times."""
    plan = make_plan(recipe.policy, train_examples=recipe.train_examples, epochs=EPOCHS)
    return plan if plan.num_updates <= 1_000 else None


def check_round_trip(name, plan):
    done = plan.emit(name, sequence_length=LENGTH)
    rows = SIMULATED[name](done.text)
    # What was read is what the target does, and the stray is that of the target.
    assert_same(rows_of(done.plan), rows)
    assert done.stray.num_updates == len(rows)
    assert done.stray.num_examples == sum(size for size, _, _ in rows)
    for column, told in ((0, done.stray.batch_size), (1, done.stray.learning_rate)):
        assert math.isclose(largest_error(plan, rows, column), told, rel_tol=1e-6, abs_tol=1e-9)
    return done


EXACT = {"csv", "json", "pytorch"}
EXACT_SIZES = EXACT | {"optax", "megatron", "levanter"}


@pytest.mark.parametrize("name", SIMULATED)
@settings(max_examples=8, deadline=None)
@given(recipe=recipes())
def test_round_trips(name, recipe):
    plan = small(recipe)
    if plan is not None:
        done = check_round_trip(name, plan)
        assert done.stray.batch_size == 0 or name not in EXACT_SIZES
        assert done.plan.diff(plan) is None or name not in EXACT


@pytest.mark.long
@pytest.mark.parametrize("name", SIMULATED)
def test_three_hundred_round_trips(name):
    trips = []

    @settings(max_examples=500, deadline=None, database=None)
    @given(recipe=recipes())
    def run(recipe):
        if (plan := small(recipe)) is not None:
            trips.append(check_round_trip(name, plan).stray)

    run()
    assert len(trips) >= 300
    print(
        name,
        len(trips),
        sum(t.batch_size == 0 for t in trips),
        sum(t.learning_rate < 1e-7 for t in trips),
    )


def random_megatron(rng):
    """Flags as people write them."""
    kind = rng.choice(["step", "ramp", "one", "iters"])
    size = 8 * rng.randint(1, 6)
    if kind == "step":
        length, at, steps = rng.choice([1, 2048]), 0, []
        for _ in range(rng.randint(1, 5)):
            steps.append(f"{at}:{8 * rng.randint(1, 12)}")
            at += rng.randint(1, 400) * length
        flags = f'--seq-length {length} --step-batch-size-schedule "{" ".join(steps)}"'
    elif kind == "ramp":
        increment, count = rng.randint(1, 7), rng.randint(1, 9)
        flags = f"--rampup-batch-size {size} {increment} {rng.randint(1, 3000)}"
        flags += f" --global-batch-size {size + increment * count}"
    else:
        flags = f"--global-batch-size {size}"
    total, unit = rng.randint(1500, 6000), "samples"
    if kind == "iters":
        total, unit = rng.randint(100, 300), "iters"
    flags += f" --train-{unit} {total} --lr {10 ** rng.uniform(-5, 0)} "
    style = rng.choice(["constant", "linear", "cosine", "inverse-square-root", "WSD"])
    flags += f"--lr-decay-style {style} --min-lr {rng.choice(['0', '1e-6'])} "
    if style == "WSD":
        shape = rng.choice(["exponential", "linear", "cosine", "minus_sqrt"])
        flags += f"--lr-wsd-decay-style {shape} --lr-wsd-decay-{unit} {rng.randint(1, total // 2)} "
    flags += rng.choice(["", f"--lr-decay-{unit} {rng.randint(total // 2, 2 * total)} "])
    some = rng.randint(1, total // 3)
    flags += rng.choice(
        [
            "",
            f"--lr-warmup-{unit} {some} ",
            f"--lr-warmup-fraction {rng.uniform(0, 0.9)} ",
            f"--lr-warmup-{unit}={some} --lr-warmup-init 1e-7 ",
        ]
    )
    return flags + rng.choice(["", "--optimizer sgd", "--optimizer sgd --sgd-momentum 0.5"])


def random_levanter(rng):
    updates, at, steps = rng.randint(20, 600), 0, []
    for _ in range(rng.randint(1, 5)):
        steps.append({"start": at, "value": rng.randint(1, 64)})
        at += rng.randint(1, 200)
    optimizer = {"learning_rate": 10 ** rng.uniform(-5, 0)}
    some = {
        "lr_schedule": rng.choice(["constant", "cosine", "linear"]),
        "min_lr_ratio": rng.choice([0.0, 0.1, 1.0]),
        "warmup": rng.choice([0.0, 0.25, 1, 17]),
        "decay": rng.choice([0.0, 0.2, 1, 40]),
    }
    optimizer |= {name: value for name, value in some.items() if rng.random() < 0.7}
    sizes = steps if rng.random() < 0.8 else rng.randint(1, 64)
    trainer = {"num_train_steps": updates, "train_batch_size": sizes}
    return repr({"trainer": trainer, "optimizer": optimizer})


def random_maxtext(rng):
    start, increment, count = rng.randint(1, 8), rng.randint(1, 4), rng.randint(1, 6)
    steps = rng.randint(20, 500)
    config = {
        "steps": steps,
        "learning_rate": 10 ** rng.uniform(-5, 0),
        "per_device_batch_size": float(start + increment * count),
    }
    if rng.random() < 0.8:
        config |= {
            "enable_rampup_batch_size": True,
            "per_device_batch_size_start": float(start),
            "per_device_batch_size_increment": float(increment),
            "global_rampup_samples": rng.randint(1, 4000),
        }
    some = {
        "lr_schedule_type": rng.choice(["cosine", "wsd"]),
        "learning_rate_schedule_steps": rng.randint(steps // 2, 2 * steps),
        "learning_rate_final_fraction": rng.choice([0.0, 0.3]),
        "warmup_steps_fraction": rng.choice([0.0, 0.2]),
        "wsd_decay_steps_fraction": rng.choice([0.0, 0.05, 0.5]),
        "wsd_decay_style": rng.choice(["linear", "cosine"]),
    }
    return repr(config | {name: v for name, v in some.items() if rng.random() < 0.6})


def random_olmo_core(rng):
    size, at, sizes, starts = LENGTH * rng.randint(1, 8), 0, [], []
    for _ in range(rng.randint(1, 5)):
        sizes.append(size)
        starts.append({"value": at, "unit": "tokens"})
        smaller = [r for r in (2, 3) if size % (r * LENGTH) == 0]
        shrinks = smaller and rng.random() < 0.3
        size = size // rng.choice(smaller) if shrinks else size * rng.choice([2, 3, 4])
        at += rng.randint(1, 2000)
    total = rng.randint(3000, 30_000)
    kind = rng.choice(["constant", "constant_with_warmup", "wsd", "cos_with_warmup"])
    kind = rng.choice([kind, "linear_with_warmup"])
    scheduler = {"type": kind}
    if kind != "constant":
        told = [{"warmup": rng.randint(0, 1000)}, {"warmup_fraction": 0.1}]
        scheduler |= {"units": "tokens", **rng.choice(told)}
    if kind == "wsd":
        told = [{"decay": rng.randint(1, 2000), "decay_fraction": None}, {"decay_fraction": 0.2}]
        scheduler |= rng.choice(told)
    elif kind.startswith(("cos", "linear")):
        scheduler |= rng.choice([{}, {"alpha_f": 0.0}, {"t_max": total // 2}])
    duration = {"value": total, "unit": "tokens"}
    config = {"batch_sizes": sizes, "schedule": starts, "max_duration": duration}
    return repr(config | {"lr": 10 ** rng.uniform(-5, 0), "scheduler": scheduler})


READERS = {
    "megatron": (random_megatron, megatron.read, simulators.megatron),
    "levanter": (random_levanter, levanter.read, simulators.levanter),
    "maxtext": (
        random_maxtext,
        lambda text: maxtext.read(text, 2),
        lambda text: simulators.maxtext(text, 2),
    ),
    "olmo_core": (
        random_olmo_core,
        lambda text: olmo_core.read(text, 1, LENGTH),
        lambda text: simulators.olmo_core(text, LENGTH),
    ),
}


def refusal(read, text):
    """The field that is refused."""
    try:
        read(text)
    except UserError as error:
        (problem,) = error.problems
        return problem.field
    return None


@pytest.mark.parametrize("name", READERS)
def test_three_hundred_of_other_peoples_schedules_are_read_as_they_run(name):
    write, read, simulate = READERS[name]
    rng = random.Random(name)
    done = 0
    while done < 300:
        text = write(rng)
        refused = refusal(read, text)
        if refused:
            # A warm-up that is longer than the decay, or both shares above 1.
            assert "warmup" in refused, text
            continue
        recipe = read(text)
        rows = simulate(text)
        assert_same(rows_of(recipe.plan(1000)), rows)
        # The policy gives the same plan.
        epochs = sum(size for size, _, _ in rows) / 1000
        laid_out = make_plan(recipe.policy(1000), train_examples=1000, epochs=epochs)
        assert_same(rows_of(laid_out), rows)
        done += 1


GOLDEN = {
    # The example of Megatron's documents, in tokens of sequences of 4,096, from its thresholds.
    "megatron": (
        '--seq-length 4096 --step-batch-size-schedule "0:768 250B:1536 500B:3072 750B:6144" '
        "--train-samples 200000000 --lr 1e-4 --lr-decay-style constant",
        [(0, 768), (61_035_264, 1536), (122_071_296, 3072), (183_105_792, 6144)],
    ),
    # Sizes 8, 12, 16, 20 on equal shares of 400: 17 updates of 8, 12 of 12, 9 of 16.
    "maxtext": (
        "{steps: 60, learning_rate: 0.1, per_device_batch_size: 10, enable_rampup_batch_size: true,"
        " per_device_batch_size_start: 4, global_rampup_samples: 400}",
        [(0, 8), (136, 12), (280, 16), (424, 20)],
    ),
    # Stages of 10, 5 and 25 updates.
    "levanter": (
        "{trainer: {num_train_steps: 40, train_batch_size: [{start: 0, value: 4},"
        " {start: 10, value: 8}, {start: 15, value: 32}]}, optimizer: {learning_rate: 0.1}}",
        [(0, 4), (40, 8), (80, 32)],
    ),
    # 5 batches of 4 reach the 17th example, but 16 wait for a multiple of 4 batches: the 8th.
    "olmo_core": (
        "{batch_sizes: [32, 128], schedule: [{value: 0, unit: tokens}, {value: 136, unit: tokens}],"
        " max_duration: {value: 2560, unit: tokens}, lr: 0.1}",
        [(0, 4), (32, 16)],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_stages_by_hand(name):
    text, stages = GOLDEN[name]
    plan = READERS[name][1](text).plan(200_000_000)
    assert [(stage.first_example, stage.batch_size) for stage in plan.stages] == stages
    if name == "olmo_core":
        # The root of the ratio.
        assert plan.hypers["learning_rate"][[0, -1]].tolist() == [0.1, 0.2]


EDGES = [
    # The warm-up ends within the decay; the decay is one update, in each style.
    (
        "megatron",
        "--global-batch-size 8 --train-samples 800 --lr 1 --lr-warmup-samples 160 "
        "--lr-decay-style WSD --lr-wsd-decay-samples 700 --lr-wsd-decay-style linear",
    ),
    # The last batch goes past the end while the learning rate rises.
    (
        "olmo_core",
        "{batch_sizes: [80], schedule: [{value: 0, unit: tokens}], lr: 1, max_duration: {"
        "value: 1000, unit: tokens}, scheduler: {type: constant_with_warmup, units: tokens, "
        "warmup: 1040}}",
    ),
    *(
        (
            "maxtext",
            "{steps: 20, learning_rate: 1, per_device_batch_size: 4, warmup_steps_fraction: 0.95, "
            f"lr_schedule_type: wsd, wsd_decay_steps_fraction: 0.05, wsd_decay_style: {style}}}",
        )
        for style in ("cosine", "linear")
    ),
]


@pytest.mark.parametrize(("name", "text"), EDGES)
def test_edges_of_a_decay(name, text):
    _, read, simulate = READERS[name]
    assert_same(rows_of(read(text).plan(1000)), simulate(text))


def plan_of(policy, epochs=6, train_examples=1000, **others):
    return make_plan(policy, train_examples=train_examples, epochs=epochs, **others)


COSINE = cosine(0.1, 10, epochs=6)
LINE = warmup(polynomial(0.1, 10, from_epoch=1, until_epoch=6), warmup_epochs=1)
STEPS = step_decay(0.1, 10, boundaries_epochs=[2, 4], factor=0.25)
RAMP = {"initial_batch_size": 5, "increment_examples": 5}
ROOTS = "0:0.1 2_epochs:0.2 4_epochs:0.4", "0:10 2_epochs:40 4_epochs:160"
CAN = {
    # What each trainer has, to the last digit.
    "a cosine": ("megatron", COSINE),
    "a ramp": ("megatron", batch_ramp(LINE, **RAMP, ramp_epochs=1)),
    "a linear decay after a warm-up": ("megatron", LINE),
    "a ramp in equal steps": ("megatron_rampup", batch_ramp(LINE, **RAMP, ramp_epochs=0.7)),
    "a line in OLMo": ("olmo_core", polynomial(0.1, 10, epochs=6)),
    "stages with OLMo's roots": ("olmo_core", stages(*ROOTS)),
    "stages in levanter": ("levanter", grow_batch(STEPS, 160)),
    "stages in Megatron": ("megatron", grow_batch(STEPS, 160)),
    "a cosine to its last update": ("maxtext", cosine(0.1, 10, epochs=5.99)),
}  # fmt: skip


@pytest.mark.parametrize("case", CAN)
def test_what_a_trainer_can_say_is_said_exactly(case):
    name, policy = CAN[case]
    done = plan_of(policy).emit(name, sequence_length=LENGTH)
    assert max(done.stray[:3]) < 1e-6, (done.stray, done.text)
    assert all("ignore" in limit for limit in done.limits)


def test_what_a_trainer_cannot_say_is_told():
    raised = raise_momentum(constant(0.1, 10, 0.9), 0.95)
    plan = plan_of(raised)
    momentum = np.where(np.arange(plan.num_updates) < 100, 0.9, 0.95)
    moving = dataclasses.replace(plan, hypers={**plan.hypers, "momentum": momentum})
    assert moving.emit("megatron").limits == ("a momentum that moves, here from 0.9 to 0.95",)
    (limit,) = plan_of(constant(0.1, 10, 0.9)).emit("levanter").limits
    assert limit == "a momentum of 0.9: it is 0, as of Adam"
    done = plan_of(constant(0.1, 10)).emit("megatron", ranks=4)
    (limit,) = done.limits
    assert limit.startswith("batch sizes that 4 ranks cannot share, such as 10 in update 0")
    # 8 of 10 examples, and the rule's learning rate with them: the noise scale holds.
    assert [round(error, 9) for error in done.stray[:3]] == [0.2, 0.2, 0.0]
    falling = plan_of(grow_batch(step_decay(0.1, 10, boundaries_epochs=[2], factor=0.5), 40))
    falling.batch_sizes.flags.writeable = True
    falling.batch_sizes[:] = falling.batch_sizes[::-1]
    assert (
        "it stops with an assertion where the batch size falls" in falling.emit("megatron").limits
    )
    (limit,) = plan_of(grow_batch(STEPS, 160)).emit("megatron_rampup").limits[-1:]
    assert "core 0.16" in limit
    moments = plan_of(grow_batch(with_rule(adam(STEPS), "square_root"), 80))
    assert any(limit.startswith("a b2 that moves") for limit in moments.emit("megatron").limits)


def test_a_ramp_under_a_line_in_maxtext():
    """Its updates are counted from those of each size of the ramp."""
    line = polynomial(0.1, 10, epochs=6)
    ramp = batch_ramp(line, initial_batch_size=4, increment_examples=2, ramp_epochs=3)
    stray = plan_of(ramp).emit("maxtext").stray
    assert stray.batch_size == 0
    assert 6000 <= stray.num_examples < 6010


def test_an_optax_module_is_followed_by_an_optimizer():
    plan = plan_of(grow_batch(STEPS, 160))
    done = plan.emit("optax")
    module = {}
    assert "bigbatch" not in done.text
    exec(done.text, module)
    updates = np.arange(plan.num_updates)
    for name in ("learning_rate", "momentum", "batch_size"):
        column = plan.batch_sizes if name == "batch_size" else plan.hypers[name]
        found = jax.jit(module[name])(updates)
        np.testing.assert_array_equal(found, column.astype(found.dtype))
    assert done.stray.batch_size == 0
    assert 0 < done.stray.learning_rate < 1e-7
    optimizer = module["optimizer"](optax.adam, b1=0.8)
    state = optimizer.init(np.zeros(2, np.float32))
    _, state = optimizer.update(np.ones(2, np.float32), state)
    assert state.hyperparams["learning_rate"] == np.float32(0.1)
    assert state.hyperparams["b1"] == np.float32(0.8)


POLICIES = {
    "megatron": {"flags": GOLDEN["megatron"][0].replace("200000000", "1000")},
    "levanter": {"config": GOLDEN["levanter"][0]},
    "maxtext": {"config": GOLDEN["maxtext"][0], "devices": 2},
    "olmo_core": {"config": GOLDEN["olmo_core"][0], "sequence_length": LENGTH},
}


def tree(name, **changes):
    return {
        "epochs": 1.0,
        "ghost_batch_examples": 4,
        "data": {"name": "digits"},
        "model": {"name": "wide_resnet", "depth": 10, "width": 1},
        "optimizer": {"name": "adam"},
        "policy": {"name": name, **POLICIES[name], **changes},
        "microbatch_examples_per_device": 4,
        "evaluation_batch_examples": 360,
        "log_every_updates": 1,
        "evaluate_every_epochs": 1,
        "checkpoint_every_epochs": 1,
    }


@pytest.mark.parametrize("name", POLICIES)
def test_a_config_names_another_trainers_schedule_and_grows_it(name):
    config = read_config(tree(name))
    if name != "megatron":
        found = [(s.first_example, s.batch_size) for s in config.plan.stages]
        assert found == [stage for stage in GOLDEN[name][1] if stage[0] < config.plan.num_examples]
    most = 2 * int(config.plan.batch_sizes.max())
    grow = {"name": "grow_batch", "max_batch_size": most}
    grown = read_config(tree(name) | {"transformations": [grow]})
    # All of it holds the noise scale of what was read.
    at = grown.source_plan.at_example(grown.plan.first_examples)
    np.testing.assert_allclose(
        grown.plan.noise_scales,
        grown.source_plan.noise_scales[at],
        rtol=0.35 if name != "megatron" else 1e-9,
    )


LEVANTER, MAXTEXT, OLMO = (GOLDEN[name][0] for name in ("levanter", "maxtext", "olmo_core"))


NO_TABLES = [
    "",
    "batch_size,learning_rate\n1e300,1\n",
    'batch_size,learning_rate\n"' + "1" * 200_000,
    "batch_size,learning_rate\n",
    "batch_size\n3\n",
    "batch_size,learning_rate\n2.5,1\n",
]


def problems(read, text):
    with pytest.raises(UserError) as caught:
        read(text)
    return caught.value.problems


STEP = '--seq-length 8 --step-batch-size-schedule "0:4" --train-samples 100 --lr 0.1 '
RAMP_FLAGS = "--global-batch-size 32 --train-samples 900 --lr 1 --rampup-batch-size {}"
MISTAKES = [
    ("megatron", STEP + "--lr-warmup-sample 10", "--lr-warmup-sample", "lr-warmup-samples"),
    ("megatron", STEP + "--global-batch-size 8", "--global-batch-size", None),
    ("megatron", STEP + "--rampup-batch-size 4 4 100", "--rampup-batch-size", None),
    ("megatron", STEP + "--train-iters 10", "--train-samples", None),
    ("megatron", STEP + "--lr-warmup-iters 3", "--lr-warmup-iters", None),
    ("megatron", STEP + "--lr 0.2", "--lr", None),
    ("megatron", STEP + "--min-lr 0.2", "--min-lr", 0.1),
    ("megatron", STEP + "--lr-wsd-decay-samples 5", "--lr-wsd-decay-samples", None),
    ("megatron", STEP + "--lr-decay-style cosin", "--lr-decay-style", "cosine"),
    ("megatron", STEP.replace("--seq-length 8", ""), "--seq-length", None),
    ("megatron", STEP.replace("0:4", "0:4 10"), "--step-batch-size-schedule", None),
    ("megatron", STEP.replace("0:4", "8:4"), "--step-batch-size-schedule", [0, 1]),
    ("megatron", "--global-batch-size 4 --lr 1", "--train-samples", None),
    ("megatron", "--lr 1 --train-samples 9", "--global-batch-size", None),
    ("megatron", STEP.replace("--lr 0.1", ""), "--lr", None),
    ("megatron", '--lr "0', "flags", None),
    ("megatron", STEP.replace("0:4", "0:4 1e999:8"), "--step-batch-size-schedule", None),
    ("megatron", RAMP_FLAGS.format("8 0 100"), "--rampup-batch-size", None),
    ("megatron", RAMP_FLAGS.format("8 \u00b2 100"), "--rampup-batch-size", None),
    ("megatron", RAMP_FLAGS.format("8 8 0"), "--rampup-batch-size", None),
    ("megatron", RAMP_FLAGS.format("0 8 100"), "--rampup-batch-size", None),
    ("megatron", RAMP_FLAGS.format("32 8 100"), "--rampup-batch-size", None),
    ("levanter", LEVANTER.replace("15", "1" + 20 * "0"), "trainer.train_batch_size", [0, 10]),
    ("levanter", "[1, 2]", "config", None),
    ("levanter", "{trainer: 3, optimizer: {}}", "trainer", None),
    ("levanter", "no_such_file.yaml", "config", None),
    ("levanter", "{" * 10_000, "config", None),
    ("levanter", LEVANTER.replace("start: 10", "start: 0"), "trainer.train_batch_size", [0, 15]),
    ("levanter", LEVANTER.replace("rate", "rat"), "optimizer.learning_rat", "learning_rate"),
    ("maxtext", MAXTEXT.replace("start: 4", "start: 5"), "per_device_batch_size_increment", None),
    ("maxtext", "{steps: 2.5, learning_rate: x, per_device_batch_size: 1}", "steps", 2),
    ("olmo_core", OLMO.replace("128", "72"), "batch_sizes[1]", 64),
    ("olmo_core", OLMO.replace("136, unit: tokens", "136"), "schedule.unit", None),
    ("olmo_core", OLMO.replace("136, unit: tokens", "136, unit: steps"), "schedule.unit", "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "field", "nearest"), MISTAKES)
def test_mistakes(name, text, field, nearest):
    found = problems(READERS[name][1], text)
    (problem,) = [each for each in found if each.field == field]
    assert problem.nearest == nearest
    assert problem.allowed


def test_whole_numbers_are_asked_for_where_they_count():
    found = problems(maxtext.read, "{steps: 2.5, learning_rate: x, per_device_batch_size: 1}")
    allowed = {problem.field: problem.allowed for problem in found}
    assert allowed["steps"] == "a whole number from 0 on"
    assert allowed["learning_rate"] == "a number from 0 on"


def test_a_learning_rate_is_least_at_the_smallest_batch():
    """The root of the ratio of 4: 0.05 there, and a warm-up cannot begin above it."""
    falling = OLMO.replace("[32, 128]", "[128, 32]").replace("lr: 0.1", "lr: 0.1, scheduler: {}")
    curve = "{type: linear_with_warmup, units: tokens, warmup: 80, warmup_min_lr: 0.07}"
    found = problems(READERS["olmo_core"][1], falling.replace("{}", curve))
    allowed = {problem.field: problem.allowed for problem in found}
    words = "below the base learning rate, which is 0.05 at the least"
    assert allowed["scheduler.warmup_min_lr"] == words


@pytest.mark.parametrize("name", sorted(SIMULATED.keys() - {"levanter"}))
def test_a_plan_of_one_update(name):
    done = check_round_trip(name, plan_of(constant(0.1, 1000, 0.9), epochs=1))
    assert done.stray.num_updates == 1


def test_a_run_without_end_is_refused():
    recipe = megatron.read("--global-batch-size 4 --lr 1 --train-samples 1_000_000_000_000")
    with pytest.raises(UserError, match=r"^updates: given 250000000000; .* 16,777,216 updates"):
        recipe.plan(100)


@pytest.mark.parametrize("text", NO_TABLES)
def test_tables_that_are_none(text, tmp_path, capsys):
    (tmp_path / "plan.csv").write_text(text)
    assert cli.main(["plan", "--config=digits:decay", f"--against=csv:{tmp_path}/plan.csv"]) == 2
    assert "csv: given" in capsys.readouterr().err


def test_the_command_writes_and_compares(tmp_path, capsys):
    assert (
        cli.main(["plan", "--config=digits:increase", "--emit=megatron", "--sequence-length=4"])
        == 0
    )
    out, err = capsys.readouterr()
    assert '--step-batch-size-schedule "0:32 51840:160 103680:320"' in out
    assert "megatron cannot express this course of the learning rate" in err
    assert "540 updates (the plan: 540)" in err
    (tmp_path / "flags").write_text(out)
    against = f"--against=megatron:{tmp_path}/flags"
    assert cli.main(["plan", "--config=digits:hybrid", against]) == 0
    out, _ = capsys.readouterr()
    assert "first difference: update 408, example 13,440: learning rate 0.1 | " in out
    assert cli.main(["plan", "--config=digits:increase", "--emit=json"]) == 0
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    for other in (f"json:{tmp_path}/plan.json", "digits:increase"):
        assert cli.main(["plan", "--config=digits:increase", f"--against={other}"]) == 0
        assert "no difference" in capsys.readouterr().out
    assert cli.main(["plan", "--config=digits:increase", "--against=digits:decay"]) == 0
    out, _ = capsys.readouterr()
    assert [" ".join(line.split()) for line in out.splitlines()[2:5]] == [
        "0 32 0.1 | 0 32 0.1 .. 0.0008",
        "12,960 160 0.1 |",
        "25,920 320 0.04 .. 0.008 |",
    ]
    assert "first difference: update 405, example 12,960: batch size 160 | 32" in out


@pytest.mark.parametrize(
    "flags",
    [
        ["--emit=megatrom"],
        ["--emit=csv", "--json"],
        ["--emit=csv", "--against=csv:x"],
        ["--against=optax:x.py"],
        ["--against=csv:/no/such/file"],
        ["--against=digits:decai"],
        ["--against=digits:adaptive"],
        ["--against=fashion_mnist:decay"],
        ["--against=megatrom:flags.txt"],
        ["--emit=megatron", "--sequence-length=0"],
        ["--emit=megatron", "--devices=64"],
        ["--emit=megatron", "--compile-for=h100:8"],
        ["--against=digits:increase", "--examples-per-s=400"],
    ],
)
def test_what_the_command_refuses(flags, capsys):
    assert cli.main(["plan", "--config=digits:increase", *flags]) == 2
    assert "allowed:" in capsys.readouterr().err
