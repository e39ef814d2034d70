"""Every experiment of configs/language.py: its updates in integers, and what its docstring says."""

import importlib.util
import math
import re
from pathlib import Path

import numpy as np
import pytest

from bigbatch.config.file import load_config

FILE = Path(__file__).parents[1] / "configs" / "language.py"
SPEC = importlib.util.spec_from_file_location("language", FILE)
LANGUAGE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(LANGUAGE)

TOKENS, SEQUENCE, SMALL, LARGE, RATE, WARMUP = 600_000, 128, 4, 64, 8e-3, 15_000
# Stages of an experiment: from which token on which batch size, in sequences.
STATED = {
    "cosine": [(0, SMALL)],
    "doubling": [(0, 4), (60_000, 8), (180_000, 16), (300_000, 32), (420_000, 64)],
    "ramp": [(150_000 * k / 7, 4 * (k + 1)) for k in range(8)],
    "late": [(0, SMALL), (400_000, LARGE)],
    "wsd": [(0, SMALL)],
    "large": [(0, LARGE)],
    "linear": [(0, LARGE)],
}


def cosine(tokens):
    return math.cos(math.pi / 2 * tokens / TOKENS) ** 2


def lay_out(size_at):
    """Batch sizes of a run, update by update."""
    sizes, position = [], 0
    while position * SEQUENCE < TOKENS:
        sizes.append(size_at(position * SEQUENCE))
        position += sizes[-1]
    return sizes


def expected_sizes(name):
    if name in STATED:
        return lay_out(lambda t: [size for start, size in STATED[name] if start <= t][-1])
    if name == "seesaw":
        return lay_out(lambda t: min(LARGE, SMALL << int(-math.log2(cosine(max(t, WARMUP)) / top))))
    power = {"square_root": 2, "wsd_growth": 1}[name]

    def growing(tokens):
        rate, peak = cosine(max(tokens, WARMUP)), top
        if name == "wsd_growth":
            rate, peak = min(1.0, (TOKENS - tokens) / (0.4 * TOKENS)), 1.0
        grown = min(LARGE, SMALL * (peak / rate) ** power)
        return int(grown * (1 + 1e-12)) // 2 * 2

    return lay_out(growing)


# The learning rate is largest where the warm-up ends.
top = cosine(WARMUP)
PLANNED = [name for name in LANGUAGE.SCHEDULES if name != "adaptive"]


@pytest.mark.parametrize("name", PLANNED)
def test_plan(name):
    plan = load_config(f"{FILE}:{name}").plan
    assert plan.batch_sizes.tolist() == expected_sizes(name)
    assert plan.tokens_per_example == SEQUENCE
    assert TOKENS <= plan.num_examples * SEQUENCE < TOKENS + LARGE * SEQUENCE
    rates = plan.hypers["learning_rate"]
    assert rates[0] == 0
    highest = {"linear": RATE * LARGE / SMALL, "wsd": RATE, "wsd_growth": RATE}
    if name != "doubling":
        assert rates.max() == pytest.approx(highest.get(name, RATE * top), rel=0.03)
    row = re.search(rf"^\| {name} \| ([\d,]+) \|$", LANGUAGE.__doc__, re.MULTILINE)
    assert int(row[1].replace(",", "")) == plan.num_updates


def test_doubling_multiplies_the_learning_rate_by_the_root_of_two():
    plan = load_config(f"{FILE}:doubling").plan
    there = plan.first_examples * SEQUENCE >= WARMUP
    curve = [cosine(t) for t in (plan.first_examples[there] * SEQUENCE).tolist()]
    ratio = plan.hypers["learning_rate"][there] / (RATE * np.array(curve))
    np.testing.assert_allclose(ratio, np.sqrt(plan.batch_sizes[there] / SMALL), rtol=1e-9)


@pytest.mark.parametrize("suffix", ["-muon", "-124m"])
@pytest.mark.parametrize("schedule", LANGUAGE.SCHEDULES)
def test_the_others_are_the_same_schedules(schedule, suffix, tmp_path):
    text = FILE.read_text()
    if suffix == "-124m":
        # Its tokens need not be there for a plan.
        told = '"directory": "data/tokens"'
        assert told in text
        text = text.replace(told, '"train_examples": 2_441_407')
    copy = tmp_path / "language.py"
    copy.write_text(text)
    plan = load_config(f"{copy}:{schedule}{suffix}").plan
    ours = load_config(f"{FILE}:{schedule}").plan
    if suffix == "-muon":
        if schedule == "square_root":
            # Muon's rule grows by d for a decay by d.
            assert ours.num_updates < plan.num_updates
            return
        assert plan.batch_sizes.tolist() == ours.batch_sizes.tolist()
        assert set(plan.hypers) == {"learning_rate", "momentum"}
    else:
        assert plan.tokens_per_example == 1024
        assert 2.5e9 <= plan.num_examples * 1024 < 2.51e9
        assert {min(plan.batch_sizes), max(plan.batch_sizes)} <= {512, 2048, 4096}


def test_adaptive_starts_as_cosine_does():
    config = load_config(f"{FILE}:adaptive")
    assert config.controller.max_batch_size == LARGE
    assert (config.plan.batch_sizes == SMALL).all()
    assert config.optimizer.weight_decay == load_config(f"{FILE}:cosine").optimizer.weight_decay
