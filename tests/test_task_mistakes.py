"""Mistakes in a task: each is one sentence, before anything is compiled."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbatch.engine.task import Task
from bigbatch.engine.task_checks import check_task
from bigbatch.errors import UserError
from bigbatch.models.classification import image_classification
from bigbatch.models.wide_resnet import WideResNet

GHOST_BATCHES, EXAMPLES = 2, 8


def described(**entries):
    """A specimen microbatch of `EXAMPLES` in `GHOST_BATCHES`; entries are (shape, dtype)."""
    entries |= {"weight": ((), np.float32)}
    shapes = {
        name: jax.ShapeDtypeStruct((EXAMPLES, *shape), dtype)
        for name, (shape, dtype) in entries.items()
    }
    return shapes | {"ghost_mask": jax.ShapeDtypeStruct((GHOST_BATCHES,), np.float32)}


POINTS = described(x=((3,), np.float32), label=((), np.int32))


def init(key):
    kernel = jax.random.normal(key, (3, 5))
    return {"kernel": kernel}, {"mean": jnp.zeros(3)}


def ghost_mean(x):
    return jnp.mean(x.reshape(GHOST_BATCHES, -1, 3), axis=1)


def apply(params, statistics, examples, train):
    ghosts = {"mean": ghost_mean(examples["x"])} if train else {}
    return (examples["x"] - statistics["mean"]) @ params["kernel"], ghosts


def loss(outputs, examples):
    weight = examples["weight"]
    losses = jnp.square(outputs[:, 0] - examples["label"])
    correct = (outputs[:, 0] > outputs[:, 1]) == (examples["label"] == 0)
    return {
        "loss": jnp.sum(weight * losses),
        "correct": jnp.sum(weight * correct),
        "count": jnp.sum(weight),
    }


TASK = Task(init, apply, loss)


def problems(examples=POINTS, **changes):
    with pytest.raises(UserError) as error:
        check_task(dataclasses.replace(TASK, **changes), examples)
    assert all("\n" not in str(problem) for problem in error.value.problems)
    return error.value.problems


def with_sums(**more):
    """The loss with other sums: functions of outputs and examples."""
    return lambda outputs, examples: (
        loss(outputs, examples) | {name: f(outputs, examples) for name, f in more.items()}
    )


def with_ghosts(function):
    def applied(params, statistics, examples, train):
        return apply(params, statistics, examples, train)[0], function(examples["x"])

    return applied


def weights(examples):
    return examples["weight"]


MISTAKES = {
    "init of no key": (
        {"init": lambda: init(jax.random.key(0))},
        ["task.init: given 'TypeError: ", "takes 0 positional arguments", "function of (key)"],
    ),
    "init no function": (
        {"init": 3},
        ["task.init: given \"TypeError: 'int' object is not callable", "function of (key)"],
    ),
    "init returns one value": (
        {"init": lambda key: init(key)[0]},
        ["task.init: given 'returns dict'", "a pair: (parameters, running statistics)"],
    ),
    "init returns three values": (
        {"init": lambda key: (*init(key), 0)},
        ["task.init: given 'returns 3 values'"],
    ),
    "params of integers": (
        {"init": lambda key: ({"kernel": jnp.ones((3, 5), int)}, {"mean": jnp.zeros(3)})},
        ["task.init: given \"params['kernel'] of int32\"", "of a floating dtype"],
    ),
    "params no arrays": (
        {"init": lambda key: ({"kernel": "he_normal"}, {})},
        ["task.init: given \"params['kernel'] of str\"", "of a floating dtype"],
    ),
    "statistics of integers": (
        {"init": lambda key: (init(key)[0], {"mean": jnp.zeros(3, int)})},
        ["task.init: given \"running_statistics['mean'] of int32\""],
    ),
    "no parameter": (
        {"init": lambda key: ({}, {})},
        ["task.init: given 'no parameter'", "at least one array to train"],
    ),
    "init raises": (
        {"init": lambda key: jnp.zeros(3) @ jnp.zeros(4)},
        ["task.init: given 'TypeError: ", "a function of (key) that JAX can trace"],
    ),
    "apply returns one value": (
        {"apply": lambda params, statistics, examples, train: examples["x"] @ params["kernel"]},
        ["task.apply: given 'returns ", "a pair: (outputs, ghost statistics)"],
    ),
    "apply of other arguments": (
        {"apply": lambda params, examples: (examples["x"] @ params["kernel"], {})},
        [
            "task.apply: given 'TypeError: ",
            "takes 2 positional arguments but 4 were given",
            "function of (params, statistics, examples, train)",
        ],
    ),
    "apply with train by name only": (
        {"apply": lambda params, statistics, examples, *, train: None},
        ["task.apply", "takes 3 positional arguments"],
    ),
    "apply reads what is not there": (
        {"apply": lambda params, statistics, examples, train: (examples["labels"], {})},
        [
            "task.apply: given \"KeyError: 'labels'\"",
            "what is there: label, weight, ghost_mask, x",
            "nearest: 'label'",
        ],
    ),
    "apply reads keys unasked": (
        {"apply": lambda params, statistics, examples, train: (examples["key"], {})},
        ["task.apply: given \"KeyError: 'key'\"", "with takes_keys=True"],
    ),
    "apply reads keys in evaluation": (
        {
            "apply": lambda params, statistics, examples, train: [
                apply(params, statistics, examples, train),
                examples["key"],
            ][0],
            "takes_keys": True,
            "examples": POINTS | {"key": jax.ShapeDtypeStruct((EXAMPLES, 2), np.uint32)},
        },
        [
            "task.apply: given \"KeyError: 'key'\"",
            "what is there: label, weight, x; ",
            "key there too",
        ],
    ),
    "apply does not take frozen": (
        {"frozen": {"table": np.zeros(4)}},
        ["task.apply: given", "(params, statistics, examples, train, frozen)"],
    ),
    "apply raises": (
        {"apply": lambda params, statistics, examples, train: 1 / 0},
        ["task.apply: given 'ZeroDivisionError: division by zero'"],
    ),
    "apply looks at numbers": (
        {"apply": lambda params, statistics, examples, train: bool(params["kernel"][0, 0] > 0)},
        ["task.apply: given 'TracerBoolConversionError: "],
    ),
    "apply is not differentiable": (
        {
            "apply": lambda params, statistics, examples, train: (
                jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x + 1, params["kernel"])
                + apply(params, statistics, examples, train)[0][:, :, None, None],
                apply(params, statistics, examples, train)[1],
            ),
            "loss": lambda outputs, examples: {
                "loss": jnp.sum(weights(examples) * jnp.sum(outputs, axis=(1, 2, 3))),
                "count": jnp.sum(weights(examples)),
            },
        },
        ["task.apply: given 'ValueError: Reverse-mode", "functions that JAX can differentiate"],
    ),
    "ghost statistics missing": (
        {"apply": with_ghosts(lambda x: {})},
        [
            "task.apply: given \"ghost statistics that differ in ['mean']\"",
            "structure of the running statistics",
        ],
    ),
    "ghost statistics unknown": (
        {"apply": with_ghosts(lambda x: {"mean": ghost_mean(x), "var": ghost_mean(x)})},
        ["task.apply: given \"ghost statistics that differ in ['var']\""],
    ),
    "ghost statistics in another container": (
        {"init": lambda key: (init(key)[0], ()), "apply": lambda p, s, e, train: (e["x"], {})},
        ["ghost statistics that differ in their containers", "structure of the running statistics"],
    ),
    "ghost statistics of no ghost batch": (
        {"apply": with_ghosts(lambda x: {"mean": jnp.mean(x, axis=0)})},
        [
            "ghost statistics['mean'] of shape (3,)",
            "[ghost batches, *running shape], here of shape (2, 3)",
        ],
    ),
    "ghost statistics of another shape": (
        {"apply": with_ghosts(lambda x: {"mean": ghost_mean(x)[:, :1]})},
        ["ghost statistics['mean'] of shape (2, 1)", "here of shape (2, 3)"],
    ),
    "ghost statistics of integers": (
        {"apply": with_ghosts(lambda x: {"mean": ghost_mean(x).astype(int)})},
        ["ghost statistics['mean'] of int32", "of a floating dtype"],
    ),
    "loss of other arguments": (
        {"loss": lambda outputs: {}},
        [
            "task.loss: given 'TypeError: ",
            "takes 1 positional argument",
            "function of (outputs, examples)",
        ],
    ),
    "loss returns no mapping": (
        {"loss": lambda outputs, examples: jnp.sum(outputs)},
        ["task.loss: given 'returns ", "a mapping: sums over the examples by name"],
    ),
    "loss raises": (
        {"loss": lambda outputs, examples: outputs.shape.area},
        ["task.loss: given \"AttributeError: 'tuple' object has no attribute 'area'\""],
    ),
    "no count": (
        {"loss": lambda outputs, examples: {"loss": loss(outputs, examples)["loss"]}},
        ["task.loss: given 'sums loss'", "'count' among them"],
    ),
    "not what is minimised": (
        {"minimised": "nats"},
        ["task.loss: given 'sums loss, correct, count'", "'nats' among them"],
    ),
    "a vector": (
        {"loss": with_sums(loss=lambda outputs, examples: weights(examples))},
        [
            "task.loss: given \"sums['loss'] of shape (8,)\"",
            "a sum over the examples, here of shape ()",
        ],
    ),
    "a sum of integers": (
        {"loss": with_sums(right=lambda outputs, examples: jnp.sum(examples["label"]))},
        ["sums['right'] of int32", "floating"],
    ),
    "a sum of booleans": (
        {"loss": with_sums(right=lambda outputs, examples: jnp.all(outputs > 0))},
        ["sums['right'] of bool", "floating"],
    ),
    "a complex sum": (
        {"loss": with_sums(right=lambda outputs, examples: jnp.sum(outputs) * 1j)},
        ["sums['right'] of complex64", "floating"],
    ),
    "a number for a sum": (
        {"loss": with_sums(right=lambda outputs, examples: 0.0)},
        ["sums['right'] of float", "floating"],
    ),
    "a mapping for a sum": (
        {"loss": with_sums(right=lambda outputs, examples: {"a": jnp.sum(outputs)})},
        ["sums['right'] of dict", "floating"],
    ),
    "a mean of losses": (
        {"loss": with_sums(loss=lambda outputs, e: jnp.mean(weights(e) * outputs[:, 0]))},
        ["task.loss: given 'loss 0.4167 of two examples, 0.5 and 0.3333 of each alone'", "sums"],
    ),
    "a mean of right answers": (
        {"loss": with_sums(correct=lambda o, e: loss(o, e)["correct"] / len(o))},
        ["task.loss: given 'correct 0.5 of two examples, 1 and 0 of each alone'", "sums"],
    ),
    "weights forgotten": (
        {"loss": with_sums(loss=lambda outputs, examples: jnp.sum(jnp.square(outputs)))},
        ["task.loss: given 'loss ", "where all weights are 0", "exactly 0", "times its weight"],
    ),
    "weights forgotten where labels are not 0": (
        {"loss": with_sums(right=lambda outputs, examples: jnp.sum(1.0 * examples["label"]))},
        ["task.loss: given 'right 2 where all weights are 0'"],
    ),
    "count of at least 1": (
        {"loss": with_sums(count=lambda o, e: jnp.maximum(jnp.sum(weights(e)), 1))},
        ["task.loss: given 'count 1 where all weights are 0'"],
    ),
    "masked examples divided by 0": (
        {"loss": with_sums(right=lambda o, e: jnp.sum(weights(e) * (o[:, 0] / e["label"])))},
        ["task.loss: given 'right nan where all weights are 0'", "jnp.where"],
    ),
    "masked examples with a gradient of NaN": (
        {
            "loss": with_sums(
                loss=lambda o, e: jnp.sum(jnp.where(weights(e) > 0, o[:, 0] / e["label"], 0))
            )
        },
        ["task.loss: given 'the gradient by the outputs nan where all weights are 0'", "jnp.where"],
    ),
    "a negative count": (
        {"loss": with_sums(count=lambda outputs, examples: -jnp.sum(weights(examples)))},
        ["task.loss: given 'count -2'", "not negative"],
    ),
    "metrics of a sum that is not there": (
        {"metrics": {"accuracy": "corect"}},
        [
            "task.metrics.accuracy: given \"KeyError: 'corect'\"",
            "what is there: correct, loss",
            "nearest: 'correct'",
        ],
    ),
    "metrics of the count": (
        {"metrics": {"n": "count"}},
        ["task.metrics.n: given \"KeyError: 'count'\""],
    ),
    "metrics that read a sum that is not there": (
        {"metrics": {"perplexity": lambda means: math.exp(means["nats"])}},
        ["task.metrics.perplexity: given \"KeyError: 'nats'\"", "there: correct, loss"],
    ),
    "metrics no mapping": (
        {"metrics": "accuracy"},
        ["task.metrics: given 'ValueError: ", "name -> a sum's name"],
    ),
    "decay of 1": (
        {"running_decay": 1.0},
        ["task.running_decay: given 1.0", "between 0 and 1", "nearest: 0.999"],
    ),
    "decay of words": ({"running_decay": "slow"}, ["task.running_decay: given 'slow'"]),
    "decay of 0 in a tree": (
        {"running_decay": {"mean": np.float32(0)}},
        ["task.running_decay['mean']: given 0.0", "between 0 and 1"],
    ),
    "decays of other statistics": (
        {"running_decay": {"means": 0.9}},
        ["task.running_decay: given \"decays that differ in ['mean']\"", "running statistics"],
    ),
} | {
    f"reserved {name}": (
        {"loss": with_sums(**{name: lambda outputs, examples: jnp.sum(weights(examples))})},
        [f"task.loss: given \"sums['{name}']\"", "other names than"],
    )
    for name in (
        *("examples", "is_exact", "gradient_is_finite"),
        *("small_squares", "small_batches", "big_square"),
    )
}


@pytest.mark.parametrize(("changes", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence(changes, parts):
    (problem,) = problems(**changes)
    for part in parts:
        assert part in str(problem)


def test_mistakes_that_can_be_found_together_are_told_together():
    found = problems(
        apply=with_ghosts(lambda x: {}),
        loss=with_sums(loss=lambda o, e: jnp.sum(o)),
        metrics={"accuracy": "corect"},
        running_decay=2,
    )
    assert {problem.field for problem in found} == {
        *("task.apply", "task.loss", "task.metrics.accuracy", "task.running_decay")
    }
    assert len(found) == 4
    found = problems(
        init=lambda key: ({"kernel": jnp.ones((3, 5), int), "bias": 1}, {}), running_decay=0
    )
    assert sorted(problem.field for problem in found) == [*["task.init"] * 2, "task.running_decay"]
    found = problems(
        loss=lambda outputs, examples: {"examples": outputs, "right": jnp.sum(examples["label"])}
    )
    # No count, no loss, a reserved name, no scalar, integers.
    assert [problem.field for problem in found] == ["task.loss"] * 5


def test_what_a_function_has_raised_is_the_cause():
    def applied(params, statistics, examples, train):
        raise ZeroDivisionError("by hand\nin two lines")

    with pytest.raises(UserError, match="'ZeroDivisionError: by hand in two lines'") as error:
        check_task(dataclasses.replace(TASK, apply=applied), POINTS)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_right_task_gives_its_shapes():
    shapes = check_task(TASK, POINTS)
    assert shapes.params["kernel"].shape == (3, 5)
    assert shapes.running_statistics["mean"].shape == (3,)
    check_task(dataclasses.replace(TASK, running_decay={"mean": np.float32(0.99)}), POINTS)
    metrics = {"perplexity": lambda means: jnp.exp(means["loss"]), "accuracy": "correct"}
    check_task(dataclasses.replace(TASK, metrics=metrics), POINTS)
    small = with_sums(count=lambda outputs, examples: 0.01 * jnp.sum(weights(examples)))
    check_task(dataclasses.replace(TASK, loss=small), POINTS)


def test_the_bundled_task_is_right():
    module = WideResNet(10, 1, 10, EXAMPLES // GHOST_BATCHES, axis_name="data", dropout_rate=0.1)
    task = image_classification(module, (8, 8, 1), (3.0,), (2.0,), label_smoothing=0.1)
    images = described(image=((8, 8, 1), np.uint8), label=((), np.int32), key=((2,), np.uint32))
    shapes = check_task(task, images)
    expected = jax.eval_shape(task.init, jax.random.key(1))
    assert jax.tree.leaves(shapes) == jax.tree.leaves(expected)


def masked_tokens(outputs, examples):
    """A loss per token: tokens of id 0 are padding."""
    weight = examples["weight"][:, None] * (examples["target"] > 0)
    logits = outputs["logits"].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples["target"])
    length = jnp.sum(examples["target"] > 0, axis=1)
    mean = jnp.sum(weight * losses, axis=1) / jnp.maximum(length, 1)
    return {
        "nats": jnp.sum(weight * losses),
        "by_text": jnp.sum(mean),
        "count": jnp.sum(weight),
        "balance": jnp.sum(examples["weight"]) * outputs["balance"],
    }


def test_a_loss_per_token_with_masks_in_bfloat16_is_right():
    def apply(params, statistics, examples, train, frozen):
        # On the device's axis, as a norm over all devices has it.
        mean = jax.lax.pmean(jnp.mean(params["table"]), "data")
        logits = params["table"][examples["token"]] @ frozen["head"] + mean
        return {"logits": logits, "balance": jnp.square(mean), "seen": examples["token"]}, {}

    task = Task(
        init=lambda key: ({"table": jax.random.normal(key, (11, 4), jnp.bfloat16)}, {}),
        apply=apply,
        loss=masked_tokens,
        minimised="nats",
        metrics={"perplexity": lambda means: math.exp(means["nats"])},
        frozen={"head": np.ones((4, 11), np.float32)},
    )
    texts = described(token=((6,), np.int32), target=((6,), np.int32))
    shapes = check_task(task, texts)
    assert shapes.params["table"].dtype == jnp.bfloat16
    assert shapes.running_statistics == {}


def test_a_loss_of_probabilities_is_right():
    """It has no value where outputs are negative, and none at all for some of the labels."""
    poisson = with_sums(
        loss=lambda o, e: jnp.sum(weights(e) * (o[:, 0] - e["label"] * jnp.log(o[:, 0]))),
        geometric=lambda o, e: jnp.sum(
            jnp.where(weights(e) > 0, weights(e) / jnp.log(1.0 * e["label"]), 0)
        ),
    )
    check_task(dataclasses.replace(TASK, loss=poisson), POINTS)


def test_nothing_of_the_model_is_computed():
    """A model of ten terabytes is checked like any other."""
    width = 1_600_000

    def apply(params, statistics, examples, train):
        hidden = examples["x"] @ jnp.ones((3, width)) @ params["wide"]
        return hidden @ jnp.ones((width, 5)), {}

    task = dataclasses.replace(
        TASK, init=lambda key: ({"wide": jnp.ones((width, width))}, {}), apply=apply
    )
    assert check_task(task, POINTS).params["wide"].shape == (width, width)
