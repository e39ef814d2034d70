"""A growing schedule in the ways that JAX's users know: one process trains it once.

    python -m tests.benchmarks.growing_peers NAME DIRECTORY

Every peer trains the plan of DIRECTORY with the same network, ghost batch norm, loss, optimizer,
microbatch (where it has microbatches: the smallest batch) and an evaluation after each epoch. It
prints one JSON object.
"""

import functools
import json
import resource
import sys
import time
from pathlib import Path

START_S = time.perf_counter()

import jax  # noqa: E402 - its import is part of the time
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from bigbatch.config.config import read_config  # noqa: E402
from bigbatch.engine import functions as step  # noqa: E402
from bigbatch.models.classification import image_classification  # noqa: E402
from bigbatch.schedule.plan import Plan  # noqa: E402

RUNNING_DECAY = 0.9
WEIGHT_DECAY, MOMENTUM = 5e-4, 0.9


class Compilations:
    """Counts what XLA compiles, eager operations included."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += seconds


class Setting:
    """What all peers share."""

    def __init__(self, directory: Path) -> None:
        self.tree = json.loads((directory / "config.json").read_text())
        self.config = read_config(self.tree)
        self.plan: Plan = self.config.plan
        self.microbatch = int(self.plan.batch_sizes[0])
        self.devices = json.loads((directory / "plan.json").read_text())["devices"]
        jax.config.update("jax_num_cpu_devices", self.devices)
        mesh = step.data_mesh()
        self.replicated, self.sharded = (
            jax.NamedSharding(mesh, spec) for spec in (step.REPLICATED, step.SHARDED)
        )
        with np.load(directory / "data.npz") as arrays:
            self.train_x, self.train_y = arrays["train_images"], arrays["train_labels"]
            self.test_x, self.test_y = arrays["test_images"], arrays["test_labels"]
            mean, std = tuple(arrays["mean"].tolist()), tuple(arrays["std"].tolist())
        module = self.config.model.module(
            num_classes=10,
            ghost_batch_examples=self.config.ghost_batch_examples,
            axis_name=step.DATA_AXIS,
        )
        self.task = image_classification(module, self.train_x.shape[1:], mean, std)
        self.test = self.placed(examples(self.test_x, self.test_y))

    def placed(self, batch: dict[str, np.ndarray]) -> dict:
        """A batch, over the devices if there are many; a call brings it to a single one."""
        return batch if self.devices == 1 else jax.device_put(batch, self.sharded)

    def init(self, optimizer):
        """Parameters, running statistics and the optimizer's state, on all devices."""
        params, running = jax.jit(self.task.init)(jax.random.key(0))
        return jax.device_put((params, running, optimizer.init(params)), self.replicated)

    def wait(self, value) -> None:
        """Waits for a program with collectives; see `growing.py`."""
        if self.devices > 1:
            jax.block_until_ready(value)

    def batches(self):
        """The examples of every update, and whether an epoch ends in it."""
        order, epoch = np.empty(0, np.int64), 0
        for size in self.plan.batch_sizes.tolist():
            ends = len(order) < size
            while len(order) < size:
                fresh = np.random.default_rng(epoch).permutation(len(self.train_y))
                order, epoch = np.concatenate([order, fresh]), epoch + 1
            now, order = order[:size], order[size:]
            yield examples(self.train_x[now], self.train_y[now]), ends or not len(order)

    def loss(self, params, running, batch):
        """The mean loss, with the running statistics after this batch."""
        logits, ghosts = self.task.apply(params, running, batch, True)
        sums = self.task.loss(logits, batch)
        running = jax.tree.map(
            lambda r, s: RUNNING_DECAY * r + (1 - RUNNING_DECAY) * jnp.mean(s, axis=0),
            running,
            ghosts,
        )
        return sums["loss"] / sums["count"], (running, sums)

    @functools.cached_property
    def evaluate(self):
        @jax.jit
        def sums(params, running, batch):
            logits, _ = self.task.apply(params, running, batch, False)
            return self.task.loss(logits, batch)

        def accuracy(params, running) -> float:
            found = sums(params, running, self.test)
            return float(found["correct"] / found["count"])

        return accuracy


def examples(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """A batch as the task reads it."""
    return {"image": images, "label": labels, "weight": np.ones(len(labels), np.float32)}


def sgd(learning_rate, momentum=MOMENTUM) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(learning_rate, momentum=momentum)
    )


def jit_per_batch_size(setting: Setting) -> float:
    """A jitted update; every new batch size is another shape."""
    optimizer = optax.inject_hyperparams(sgd)(learning_rate=0.1, momentum=MOMENTUM)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(params, running, optimizer_state, batch, learning_rate):
        gradient = jax.value_and_grad(setting.loss, has_aux=True)
        (loss, (running, _)), gradients = gradient(params, running, batch)
        optimizer_state.hyperparams["learning_rate"] = learning_rate
        changes, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, changes), running, optimizer_state, loss

    params, running, optimizer_state = setting.init(optimizer)
    losses, accuracy = [], 0.0
    rates = setting.plan.hypers["learning_rate"].astype(np.float32)
    for rate, (batch, epoch_ends) in zip(rates, setting.batches(), strict=True):
        params, running, optimizer_state, loss = update(
            params, running, optimizer_state, setting.placed(batch), rate
        )
        setting.wait(params)
        losses.append(loss)
        if epoch_ends:
            accuracy = setting.evaluate(params, running)
            losses = [float(np.mean(jax.device_get(losses)))]
    return accuracy


def multi_steps(setting: Setting) -> float:
    """optax.MultiSteps with a schedule of its number of microbatches."""
    sizes = setting.plan.batch_size
    optimizer = optax.MultiSteps(
        sgd(setting.plan.learning_rate),
        every_k_schedule=lambda gradient_step: sizes(gradient_step) // setting.microbatch,
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def micro_step(params, running, optimizer_state, batch):
        gradient = jax.value_and_grad(setting.loss, has_aux=True)
        (loss, (running, _)), gradients = gradient(params, running, batch)
        changes, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, changes), running, optimizer_state, loss

    params, running, optimizer_state = setting.init(optimizer)
    losses, accuracy = [], 0.0
    for batch, epoch_ends in setting.batches():
        for first in range(0, len(batch["label"]), setting.microbatch):
            end = first + setting.microbatch
            part = {name: array[first:end] for name, array in batch.items()}
            params, running, optimizer_state, loss = micro_step(
                params, running, optimizer_state, setting.placed(part)
            )
            setting.wait(params)
            losses.append(loss)
        if epoch_ends:
            accuracy = setting.evaluate(params, running)
            losses = [float(np.mean(jax.device_get(losses)))]
    return accuracy


def microbatching(setting: Setting) -> float:
    """optax.microbatching: the largest batch's shape, of which so many microbatches are real."""
    largest = int(setting.plan.batch_sizes.max())
    optimizer = optax.inject_hyperparams(sgd)(learning_rate=0.1, momentum=MOMENTUM)

    def summed(params, running, batch):
        gradient = jax.value_and_grad(setting.loss, has_aux=True)
        (loss, (running, _)), gradients = gradient(params, running, batch)
        return gradients, running, loss

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(params, running, optimizer_state, batch, learning_rate, microbatches):
        total = optax.microbatching.microbatch(
            summed,
            argnums=2,
            microbatch_size=setting.microbatch,
            accumulator=optax.microbatching.AccumulationType.SUM,
            num_real_microbatches=microbatches,
        )(params, running, batch)
        gradients, running, loss = jax.tree.map(lambda leaf: leaf / microbatches, total)
        optimizer_state.hyperparams["learning_rate"] = learning_rate
        changes, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, changes), running, optimizer_state, loss

    params, running, optimizer_state = setting.init(optimizer)
    losses, accuracy = [], 0.0
    rates = setting.plan.hypers["learning_rate"].astype(np.float32)
    for rate, (batch, epoch_ends) in zip(rates, setting.batches(), strict=True):
        size = len(batch["label"])
        # Microbatches are strided: real and padding examples take turns along the second axis.
        strides = functools.partial(strided, largest=largest, size=size, part=setting.microbatch)
        padded = {name: strides(array) for name, array in batch.items()}
        params, running, optimizer_state, loss = update(
            *(params, running, optimizer_state, setting.placed(padded)),
            *(rate, size // setting.microbatch),
        )
        setting.wait(params)
        losses.append(loss)
        if epoch_ends:
            accuracy = setting.evaluate(params, running)
            losses = [float(np.mean(jax.device_get(losses)))]
    return accuracy


def strided(array: np.ndarray, largest: int, size: int, part: int) -> np.ndarray:
    """A batch filled up so that `reshape_batch_axis` finds the real examples first."""
    index = np.asarray(optax.microbatching.reshape_batch_axis(np.arange(largest), part))
    full = np.zeros((largest, *array.shape[1:]), array.dtype)
    full[index[: size // part].ravel()] = array
    return full


def flax_example(setting: Setting) -> float:
    """As in Flax's examples: a TrainState, a schedule in the optimizer, metrics of every update."""
    from flax.training import train_state

    class TrainState(train_state.TrainState):
        running: dict

    optimizer = sgd(setting.plan.learning_rate)
    params, running, _ = setting.init(optimizer)
    state = TrainState.create(
        apply_fn=setting.task.apply, params=params, tx=optimizer, running=running
    )

    @jax.jit
    def train_step(state, batch):
        def loss_fn(params):
            return setting.loss(params, state.running, batch)

        (loss, (running, sums)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        metrics = {
            "loss": loss,
            "accuracy": sums["correct"] / sums["count"],
            "learning_rate": setting.plan.learning_rate(state.step),
        }
        return state.apply_gradients(grads=gradients, running=running), metrics

    metrics, accuracy = [], 0.0
    for batch, epoch_ends in setting.batches():
        state, now = train_step(state, setting.placed(batch))
        setting.wait(state.params)
        metrics.append(now)
        if epoch_ends:
            jax.tree.map(lambda *each: np.mean(each), *jax.device_get(metrics))
            metrics = []
            accuracy = setting.evaluate(state.params, state.running)
    return accuracy


def ours(setting: Setting) -> float:
    """`bigbatch train`: with its log, event files, checkpoints and result file too."""
    import tempfile

    from bigbatch.config.assemble import train
    from bigbatch.workdir.files import Workdir

    with tempfile.TemporaryDirectory() as directory:
        result, _ = train(setting.config, Workdir(Path(directory) / "run"))
        return result["test_accuracy"]


def ours_as_library(setting: Setting) -> float:
    """The updates of bigbatch in a loop of one's own, which does what the peers' loops do."""
    from bigbatch.config.assemble import prepared
    from bigbatch.training.evaluate import evaluate
    from bigbatch.training.updates import updates

    run = prepared(setting.config)
    losses, accuracy = [], 0.0
    for row, state, sums in updates(run, run.init_state(), 0):
        losses.append(sums["loss"])
        end = row.first_example + row.batch_size
        is_last = row.update + 1 == run.plan.num_updates
        size = run.plan.train_examples
        if is_last or row.first_example // size < end // size:
            accuracy = evaluate(run, state)["test_accuracy"]
            losses = [float(np.mean(jax.device_get(losses)))]
    return accuracy


PEERS = {
    "bigbatch train": ours,
    "bigbatch as a library": ours_as_library,
    "jit per batch size": jit_per_batch_size,
    "optax.MultiSteps": multi_steps,
    "optax.microbatching": microbatching,
    "Flax example's loop": flax_example,
}


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    compilations = Compilations()
    setting = Setting(Path(sys.argv[2]))
    accuracy = PEERS[sys.argv[1]](setting)
    found = {
        "seconds": time.perf_counter() - START_S,
        "compilations": compilations.count,
        "compilation_s": compilations.seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "accuracy": accuracy,
        "version": f"jax {jax.__version__}, optax {optax.__version__}",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
