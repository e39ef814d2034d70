"""Optimizers in a config: their fields, and the policies that they can take."""

import pytest

from bigbatch.config.config import read_config
from bigbatch.engine import optimizer
from bigbatch.errors import UserError


def config_tree(**changes):
    tree = {
        "epochs": 1,
        "ghost_batch_examples": 32,
        "microbatch_examples_per_device": 32,
        "evaluation_batch_examples": 32,
        "log_every_updates": 1,
        "evaluate_every_epochs": 1,
        "checkpoint_every_epochs": 1,
        "data": {"name": "digits"},
        "model": {"name": "wide_resnet", "depth": 10, "width": 1},
        "optimizer": {"name": "momentum"},
        "policy": {"name": "constant", "learning_rate": 0.1, "batch_size": 32, "momentum": 0.0},
    }
    return tree | changes


def problem_fields(tree):
    with pytest.raises(UserError) as error:
        read_config(tree)
    return {problem.field: problem for problem in error.value.problems}


def test_a_config_names_any_optimizer_with_its_fields():
    for name, kind in optimizer.OPTIMIZERS.items():
        config = read_config(config_tree(optimizer={"name": name, "weight_decay": 1e-4}))
        assert config.optimizer == kind(weight_decay=1e-4)


def test_fields_out_of_range_are_all_named():
    fields = {
        "name": "adam",
        "b1": 1.0,
        "eps": -1.0,
        "weight_decay": -0.1,
        "clip_norm": 0.0,
        "average_examples": -5.0,
        "decayed": "kernel",
        "trust_coefficient": 0.1,
    }
    problems = problem_fields(config_tree(optimizer=fields))
    assert set(problems) == {f"optimizer.{name}" for name in fields if name != "name"}
    assert problems["optimizer.decayed"].nearest == "kernels"
    assert problems["optimizer.weight_decay"].nearest == 0
    below = {"name": "lamb", "b1": -0.5, "b2": -0.5}
    assert set(problem_fields(config_tree(optimizer=below))) == {"optimizer.b1", "optimizer.b2"}
    lars = problem_fields(config_tree(optimizer={"name": "lars", "trust_coefficient": 0.0}))
    assert set(lars) == {"optimizer.trust_coefficient"}
    unknown = problem_fields(config_tree(optimizer={"name": "adamv"}))
    assert unknown["optimizer.name"].nearest in ("adam", "adamw")


def test_a_policy_that_an_optimizer_cannot_take_is_refused():
    policy = config_tree()["policy"]
    with_momentum = policy | {"momentum": 0.9}
    for name in ("sgd", "adam"):
        problems = problem_fields(config_tree(optimizer={"name": name}, policy=with_momentum))
        assert set(problems) == {"policy.momentum"}
    adams = config_tree(transformations=[{"name": "adam"}])
    assert set(problem_fields(adams)) == {"optimizer.name"}
    assert problem_fields(adams)["optimizer.name"].nearest == "adam"
    twice = adams | {"optimizer": {"name": "lamb", "b2": 0.98}}
    assert set(problem_fields(twice)) == {"optimizer.b2"}
    fitting = read_config(adams | {"optimizer": {"name": "lamb"}})
    names = fitting.optimizer.hyper_names(fitting.plan.hypers)
    assert names == ("learning_rate", "b1", "b2", "eps")
