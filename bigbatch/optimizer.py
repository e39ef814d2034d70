"""Optimizers by name, Optax's own, with hyperparameters that are traced scalars.

The hyperparameters live in the optimizer's state (`optax.inject_hyperparams`), where
`step.apply_update` replaces them before each update: another value is no other program.
"""

import functools

import optax


@functools.cache
def make_optimizer(name: str, *, weight_decay: float) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose hyperparameters are set before each update.

    v <- m v + (gradient + weight_decay w); w <- w - lr v: the paper's heavy ball. The learning
    rate stands outside of the velocity, so a change of it acts at once and needs no correction of
    the velocity (Goyal et al. 2017, section 3). `nesterov` looks ahead as in Sutskever et al. 2013;
    `sgd` has no velocity.

    Args:
      name: "sgd", "momentum" or "nesterov".
      weight_decay: coefficient of the L2 penalty on all parameters, as in the paper.

    Returns:
      An Optax transformation. Its state has `hyperparams`: `learning_rate`, and `momentum` but for
      sgd. Equal arguments give the same object, so that runs in one process share their programs.
    """

    def plain(learning_rate: float) -> optax.GradientTransformation:
        return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate))

    def heavy_ball(learning_rate: float, momentum: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(weight_decay),
            optax.sgd(learning_rate, momentum, nesterov=name == "nesterov"),
        )

    if name == "sgd":
        return optax.inject_hyperparams(plain)(learning_rate=0.0)
    return optax.inject_hyperparams(heavy_ball)(learning_rate=0.0, momentum=0.0)


def hyper_names(name: str) -> tuple[str, ...]:
    """The hyperparameters that an optimizer takes from the plan."""
    return ("learning_rate",) if name == "sgd" else ("learning_rate", "momentum")
