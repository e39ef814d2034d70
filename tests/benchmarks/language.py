"""Tokens/s of a small transformer: our compiled functions, a plain NNX and Optax step, PyTorch.

    python -m tests.benchmarks.language [ROUNDS] [--torch=PYTHON] > results/language.md

One model, batch and optimizer (AdamW) for all: the transformer of `configs/language.py` on batches
of 8 sequences of 128 tokens that lie on the device. *Ours* are `accumulate` and `apply_update`, as
a run has compiled them. *Plain* is what a Flax user writes: the same module, a mean loss over whole
logits, `nnx.value_and_grad` and `nnx.Optimizer` in one `nnx.jit`. *PyTorch* is the same network in
eager mode with its own attention. They take turns; the first round is not counted. (What the whole
loop adds to our functions is in `trainer.md`.)
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import bigbatch as bb
from bigbatch.data.tokens import TokenOptions
from bigbatch.layout.layout import Microbatch
from bigbatch.models import TransformerConfig
from bigbatch.models.language import language_model
from bigbatch.models.transformer import Transformer
from bigbatch.training.microbatches import Request

BATCH, LENGTH, UPDATES = 8, 128, 50
RATE, DECAY = 3e-3, 0.1
CONFIG = TransformerConfig(layers=2, width=64, heads=2, vocabulary=256, tied=False)


def ours():
    """A function that makes an update by our compiled functions."""
    data = TokenOptions("bible_kjv", LENGTH).load()
    plan = bb.make_plan(
        bb.adam(bb.constant(RATE, BATCH, 0.0)), train_examples=data.train_examples, epochs=1
    )
    optimizer = bb.AdamW(weight_decay=DECAY)
    run = bb.prepare(
        language_model(CONFIG), data, plan, optimizer, microbatch_examples_per_device=BATCH
    )
    _, examples = run.microbatch(Request(0, Microbatch(0, BATCH, BATCH)))
    examples = jax.device_put(examples)
    hyper = {n: jnp.float32(plan.row(0).hyper[n]) for n in run.optimizer.hyper_names}
    state, accumulator = run.init_state(), run.programs.empty_accumulator()

    def update():
        nonlocal state, accumulator
        accumulator = run.programs.accumulate[BATCH](state, accumulator, examples, run.frozen)
        state, accumulator, sums = run.programs.apply_update(state, accumulator, hyper)
        return sums

    return update


def plain():
    """A function that makes an update as a Flax user would."""
    model = Transformer(CONFIG, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(RATE, weight_decay=DECAY), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 256, (BATCH, LENGTH + 1)), jnp.int32)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss(model):
            hidden, output = model(tokens)
            logits = hidden @ output.T
            targets = tokens[:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return lambda: step(model, optimizer, tokens)


def tokens_per_s(update):
    """Of some updates, waited for at the end."""
    began_s = time.perf_counter()
    for _ in range(UPDATES):
        result = update()
    jax.block_until_ready(result)
    return UPDATES * BATCH * LENGTH / (time.perf_counter() - began_s)


def torch_tokens_per_s(python):
    """In a process of its own."""
    sizes = [CONFIG.layers, CONFIG.width, CONFIG.heads, CONFIG.vocabulary, CONFIG.inner_width]
    work = json.dumps([*sizes, BATCH, LENGTH, UPDATES])
    command = [python, "tests/benchmarks/language_torch.py", work]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", type=int, nargs="?", default=7)
    parser.add_argument("--torch", metavar="PYTHON", help="of an environment with PyTorch")
    options = parser.parse_args()
    works = {"ours": ours(), "plain NNX and Optax": plain()}
    measures = {n: (lambda update=update: tokens_per_s(update)) for n, update in works.items()}
    if options.torch:
        measures["PyTorch"] = lambda: torch_tokens_per_s(options.torch)
    found = {name: [] for name in measures}
    for number in range(options.rounds + 1):
        for name, measure in measures.items():
            rate = measure()
            print(f"round {number}: {name} {rate:,.0f}", file=sys.stderr)
            if number:
                found[name].append(rate)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.rounds} rounds\n")
    print("| | tokens/s, median | ours over it, median (least to most) |\n| --- | ---: | ---: |")
    for name, rates in found.items():
        ratios = [a / b for a, b in zip(found["ours"], rates, strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {name} | {statistics.median(rates):,.0f} | {spread} |")


if __name__ == "__main__":
    main()
