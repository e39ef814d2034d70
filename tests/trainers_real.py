"""Other trainers' own code on schedules: `python trainers_real.py FORMAT PACKAGES < texts > rows`.

Of each package the modules of the schedule run as they are. What else these import is replaced by
empty names, so that no GPU and no second framework is needed. The loops around them are those of
the trainers, without a model. Runs in an environment that has these packages, PyYAML and Optax,
and not bigbatch.
"""

import abc
import ast
import enum
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path

ROOT = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()
REPLACED = ("torch", "megatron", "olmo_core", "maxtext", "levanter", "haliax", "equinox", "draccus")
REPLACED += ("bettermap",)


class Anything(abc.ABCMeta):
    """A class whose every attribute is a decorator, and which is generic."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **named: lambda value: value

    def __getitem__(cls, key):
        return cls


class Empty(types.ModuleType):
    """A module that has every class that is asked for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        found = Anything(name, (), {})
        setattr(self, name, found)
        return found


class Finder:
    """Finds an empty module for every name below those that are replaced."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REPLACED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


def load(name):
    """A module of a package as it is."""
    path = ROOT / (name.replace(".", "/") + ".py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def megatron():
    """Core: the calculators of get_num_microbatches, and OptimizerParamScheduler.

    What a script makes of its flags is in Megatron-LM's training.py, which no package has.
    """
    from trainer_simulators import megatron_args

    calculators = load("megatron.core.num_microbatches_calculator")
    sys.modules["megatron.core.utils"] = Empty("megatron.core.utils")
    sys.modules["megatron.core.utils"].log_single_rank = lambda *args: None
    schedulers = load("megatron.core.optimizer_param_scheduler")

    def rows_of(text):
        args = megatron_args(text)
        size, steps = args.global_batch_size, args.step_batch_size_schedule
        if steps:
            # Not in core 0.16.1: for a checkout of the sources.
            calculator = calculators.StepBatchsizeNumMicroBatchesCalculator(
                1, 1, False, 1, steps, args.seq_length
            )
        elif args.rampup_batch_size:
            calculator = calculators.RampupBatchsizeNumMicroBatchesCalculator(
                size, 1, 1, False, 1, *args.rampup_batch_size
            )
        else:
            calculator = calculators.ConstantNumMicroBatchesCalculator(size, 1, 1, False, 1)
        unit = size if args.train_iters else 1
        name = "iters" if args.train_iters else "samples"
        total = (args.train_iters or args.train_samples) * unit
        given = {part: getattr(args, f"lr_{part}_{name}") for part in _PARTS}
        decay = given["decay"] * unit if given["decay"] else total
        warmup = given["warmup"] * unit
        if args.lr_warmup_fraction is not None:
            warmup = args.lr_warmup_fraction * decay
        group = {}
        scheduler = schedulers.OptimizerParamScheduler(
            types.SimpleNamespace(param_groups=[group]),
            init_lr=args.lr_warmup_init,
            max_lr=args.lr,
            min_lr=args.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=decay,
            lr_decay_style=args.lr_decay_style,
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=1,
            wd_incr_style="constant",
            wsd_decay_steps=given["wsd_decay"] * unit if given["wsd_decay"] else None,
            lr_wsd_decay_style=args.lr_wsd_decay_style,
        )
        momentum = args.sgd_momentum if args.optimizer == "sgd" else 0.0
        rows, seen = [], 0
        while True:
            calculator.update(seen, consistency_check=True)
            size = calculator.get_current_global_batch_size()
            if seen >= total or (not steps and seen + size > total):
                return rows
            rows.append((size, group["lr"], momentum))
            seen += size
            scheduler.step(size)

    return rows_of


_PARTS = ("decay", "warmup", "wsd_decay")


def levanter():
    """marin-levanter: BatchSchedule and OptimizerConfig.lr_scheduler, with their own defaults."""
    import dataclasses

    import numpy as np
    import yaml

    schedule = load("levanter.schedule")
    given = load("levanter.optim.config").OptimizerConfig
    config_class = dataclasses.make_dataclass("Sgd", [], bases=(given,), frozen=True)
    config_class.__abstractmethods__ = frozenset()

    def rows_of(text):
        config = yaml.safe_load(text)
        updates, sizes = (config["trainer"][n] for n in ("num_train_steps", "train_batch_size"))
        if isinstance(sizes, list):
            sizes = [schedule.ScheduleStep(**step) for step in sizes]
        batch = schedule.BatchSchedule(sizes)
        rates = config_class(**config["optimizer"]).lr_scheduler(updates)(np.arange(updates))
        values = [schedule.value_at_step(sizes, update) for update in range(updates)]
        assert values == [batch.batch_size_at_step(update) for update in range(updates)]
        rates = np.broadcast_to(rates, updates).tolist()
        return [(size, rate, 0.0) for size, rate in zip(values, rates, strict=True)]

    return rows_of


def maxtext():
    """MaxText: RampupBatchManager and create_learning_rate_schedule, defaults of base.yml."""
    import jax.numpy as jnp
    import numpy as np
    import optax
    import yaml

    source = (ROOT / "maxtext/utils/maxtext_utils.py").read_text()
    wanted = "create_learning_rate_schedule"
    (function,) = (f for f in ast.parse(source).body if getattr(f, "name", "") == wanted)
    kinds = types.SimpleNamespace(
        LearningRateScheduleType=types.SimpleNamespace(COSINE="cosine"),
        WsdDecayStyle=types.SimpleNamespace(LINEAR="linear"),
    )
    names = {"jnp": jnp, "optax": optax, "types": kinds}
    exec(compile(ast.Module([function], []), "maxtext_utils.py", "exec"), names)
    manager_class = load("maxtext.utils.rampup_batch").RampupBatchManager
    base = yaml.safe_load((ROOT / "maxtext/configs/base.yml").read_text())

    def rows_of(text):
        config = types.SimpleNamespace(num_target_devices=1, **(base | yaml.safe_load(text)))
        if config.learning_rate_schedule_steps == -1:
            config.learning_rate_schedule_steps = config.steps
        rates = names[wanted](config)(np.arange(config.steps))
        sizes = [int(config.per_device_batch_size)] * config.steps
        if config.enable_rampup_batch_size:
            manager = manager_class(config, -1)
            for update in range(config.steps):
                sizes[update] = manager.global_batch_size_current
                manager.update()
        rates = np.broadcast_to(rates, config.steps).tolist()
        return [(size, rate, 0.0) for size, rate in zip(sizes, rates, strict=True)]

    return rows_of


def olmo_core(sequence_length=8):
    """OLMo-core: BatchSizeSchedulerCallback, DataLoaderBase, Duration and the schedulers."""
    import yaml

    config_module = sys.modules["olmo_core.config"] = Empty("olmo_core.config")
    register = classmethod(lambda cls, name: lambda value: value)
    config_module.StrEnum = enum.StrEnum
    config_module.Config = type("Config", (), {})
    config_module.Registrable = type("Registrable", (), {"register": register})
    import olmo_core.optim

    names = sys.modules["olmo_core.optim.config"] = Empty("olmo_core.optim.config")
    for module in (names, olmo_core.optim):
        module.INITIAL_LR_FIELD, module.LR_FIELD = "initial_lr", "lr"
    load("olmo_core.exceptions")
    schedulers = load("olmo_core.optim.scheduler")
    import olmo_core.train.train_module
    import torch

    torch.optim = types.SimpleNamespace(Adam=type("Adam", (), {}), AdamW=type("AdamW", (), {}))
    duration_class = load("olmo_core.train.common").Duration
    name = "olmo_core.train.callbacks.batch_size_scheduler"
    callback_class = load(name).BatchSizeSchedulerCallback
    loader_class = load("olmo_core.data.data_loader").DataLoaderBase
    loader_class.__abstractmethods__ = frozenset()
    kinds = {
        "constant": "ConstantScheduler",
        "constant_with_warmup": "ConstantWithWarmup",
        "wsd": "WSD",
        "cos_with_warmup": "CosWithWarmup",
        "linear_with_warmup": "LinearWithWarmup",
    }

    def rows_of(text):
        config = yaml.safe_load(text.replace("None", "null"))
        given = {"type": "constant"} | config.get("scheduler", {})
        kind = given.pop("type")
        scheduler = getattr(schedulers, kinds[kind])(**{"units": "tokens"} | given)
        end = config["max_duration"]["value"]
        group = {"lr": config["lr"], "initial_lr": None}
        module = olmo_core.train.train_module.TransformerTrainModule()
        module.optim, module.scheduler = torch.optim.Adam(), scheduler
        module.optim.param_groups = [group]
        loader = loader_class.__new__(loader_class)
        loader._global_batch_size, loader.batches_processed = config["batch_sizes"][0], 0
        trainer = types.SimpleNamespace(
            global_step=0,
            global_train_tokens_seen=0,
            epoch=1,
            max_tokens=end,
            data_loader=loader,
            train_module=module,
            callbacks={},
            max_duration=types.SimpleNamespace(unit="tokens"),
        )
        schedule = [duration_class(**each) for each in config["schedule"]]
        callback = callback_class(batch_sizes=config["batch_sizes"], schedule=schedule)
        callback.trainer = trainer
        callback.post_attach()
        rows = []
        while trainer.global_train_tokens_seen < end:
            callback.pre_load_batch()
            size = loader.global_batch_size
            loader.batches_processed += 1
            trainer.global_step += 1
            trainer.global_train_tokens_seen += size
            rows.append((size // sequence_length, float(scheduler.set_lr(group, trainer)), 0.0))
        return rows

    return rows_of


def pytorch():
    """torch.optim.SGD, told before each update; with a gradient of 1 its steps tell the rate."""
    import torch

    def rows_of(text):
        module = {}
        exec(text, module)
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer, rows, seen = torch.optim.SGD([weight], lr=1.0), [], 0
        while seen < module["NUM_EXAMPLES"]:
            now, before = module["at"](seen), weight.item()
            for group in optimizer.param_groups:
                group["lr"], group["momentum"] = now["learning_rate"], now["momentum"]
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            velocity = optimizer.state[weight].get("momentum_buffer")
            velocity = 1.0 if velocity is None else velocity.item()
            rows.append((now["batch_size"], (before - weight.item()) / velocity, velocity))
            seen += now["batch_size"]
        return rows

    return rows_of


def optax():
    """optax.sgd by the module's own optimizer, likewise."""
    import jax
    import numpy as np

    def rows_of(text):
        module = {}
        exec(text, module)
        optimizer = module["optimizer"]()
        weight = np.zeros(1, np.float64)
        update, rows, state = jax.jit(optimizer.update), [], optimizer.init(weight)
        for count in range(module["NUM_UPDATES"]):
            step, state = update(np.ones(1, np.float64), state, weight)
            velocity = [np.asarray(leaf) for leaf in jax.tree.leaves(state.inner_state)]
            velocity = next((float(leaf[0]) for leaf in velocity if leaf.shape == (1,)), 1.0)
            size = int(module["batch_size"](count))
            rows.append((size, float(-step[0]) / velocity, velocity))
        return rows

    return rows_of


RUNNERS = {
    "optax": optax,
    "pytorch": pytorch,
    "megatron": megatron,
    "megatron_rampup": megatron,
    "levanter": levanter,
    "maxtext": maxtext,
    "olmo_core": olmo_core,
}

if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.meta_path.insert(0, Finder())
    run = RUNNERS[sys.argv[1]]()
    json.dump([run(text) for text in json.load(sys.stdin)], sys.stdout)
