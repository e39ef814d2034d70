"""A language model with a growing batch, by the policies of today, at the size of two CPU cores.

    bigbatch compare --config=configs/language.py --workdir=runs/language --seeds=3

A transformer of 133,568 parameters on the bytes of the King James Bible, which comes with the
package: sequences of 128 tokens, 600,000 tokens in all (less than one pass over the 5,000 sequences
that are taken of it), batches from 512 tokens (4 sequences) to 16 times as many. The optimizer is
AdamW, and Muon with the suffix `-muon`. A run takes about half a minute on a quiet machine, the
comparison of three seeds (42 runs) half an hour; notebooks/results/language has what is claimed,
which was written before it was run.

| experiment | updates |
| --- | --- |
| cosine | 1,172 |
| seesaw | 738 |
| square_root | 515 |
| doubling | 346 |
| ramp | 219 |
| late | 807 |
| wsd | 1,172 |
| wsd_growth | 977 |
| large | 74 |
| linear | 74 |

- `cosine`: the reference, the batch constant and the learning rate down to 0.
- `seesaw`: wherever the cosine would be halved, it is divided by sqrt(2) and the batch doubled.
- `square_root`: Malladi's rule for the whole decay, b1 held and b2 down to 0.95.
- `doubling`: as OLMo, doubled at given tokens, the learning rate times sqrt(2) each time.
- `ramp`: as GPT-3, up in equal increments over the first tokens, the learning rate left alone.
- `late`: a small batch for most of the run, then a large one (arXiv 2602.14208).
- `wsd`: warm-up, constant, linear decay; in `wsd_growth` the batch grows in place of the decay.
- `adaptive` has no schedule: it grows the batch as the measured gradient noise asks for, and the
  learning rate follows by Seesaw's rule.
- Controls: `large` has the largest batch from the start at cosine's learning rate; `linear` that
  batch with the learning rate in proportion, which is the rule of SGD.

The learning rates are those of the lowest test loss of `cosine` and `cosine-muon` with seed 0 at
200,000 tokens, among factors of two. AdamW: 1.769, 1.699, 1.711 at 4e-3, 8e-3, 16e-3. Muon: 1.499,
1.482, 1.488 at 16e-3, 32e-3, 64e-3. Nothing else was tuned, and nothing for a batch that grows.

The suffix `-124m` is a model of GPT-2's size for one GPU, of which the tokens are to be prepared:
2.5 billion of them, batches from half a million to 4 million. Its learning rate is not searched.

    bigbatch data prepare tokens --help
    bigbatch train --config=configs/language.py:seesaw-124m --workdir=runs/seesaw-124m
"""

from ml_collections import ConfigDict

_SHARE_OF_WARMUP = 0.025
# By suffix: tokens of the run and of a sequence, sequences of the first batch, of the largest, and
# of what the noise is measured from.
_SIZES = {"": (600_000, 128, 4, 64, 2), "124m": (2_500_000_000, 1_024, 512, 4_096, 16)}
# Learning rates for the first batch: AdamW's of either size, and Muon's.
_RATES = {"": 8e-3, "muon": 32e-3, "124m": 6e-4}
SCHEDULES = (
    "cosine",
    "seesaw",
    "square_root",
    "doubling",
    "ramp",
    "late",
    "wsd",
    "wsd_growth",
    "adaptive",
    "large",
    "linear",
)
# What `bigbatch compare` runs unless it is told: the evidence.
COMPARED = (
    *("cosine", "seesaw", "square_root", "doubling", "late", "adaptive", "large", "linear"),
    *(f"{s}-muon" for s in ("cosine", "seesaw", "square_root", "doubling", "late", "large")),
)
EXPERIMENTS = tuple(
    schedule + suffix for suffix in ("", "-muon", "-124m") for schedule in SCHEDULES
)


def get_config(experiment: str) -> ConfigDict:
    schedule, _, suffix = experiment.partition("-")
    tokens, sequence_tokens, small, large, least = _SIZES.get(suffix, _SIZES[""])
    rate = _RATES[suffix]
    policy = {"name": "cosine", "learning_rate": rate, "batch_size": small}
    warmup = {"name": "warmup", "warmup_tokens": tokens * _SHARE_OF_WARMUP}
    adam = {"name": "adam", "b1": 0.9, "b2": 0.99}
    moments = [] if suffix == "muon" else [adam]
    root = {"name": "with_rule", "rule": "muon" if suffix == "muon" else "square_root"}
    seesaw = {"name": "with_rule", "rule": "muon" if suffix == "muon" else "seesaw"}
    stages = _stages(tokens, small, large)
    steps = {
        "seesaw": [seesaw, {"name": "grow_batch", "max_batch_size": large, "factor": 2}],
        "square_root": [root, {"name": "grow_batch", "max_batch_size": large}],
        "doubling": [root, {**stages["doubling"], "follow_rule": True}],
        "late": [stages["late"]],
        "wsd_growth": [seesaw, {"name": "grow_batch", "max_batch_size": large}],
        "large": [{"name": "batch_stages", "batch_size": f"0:{large}"}],
        "linear": [{"name": "scale", "factor": large / small}],
        "ramp": [
            {
                "name": "batch_ramp",
                "initial_batch_size": small,
                "increment_examples": small,
                "ramp_tokens": tokens / 4,
            }
        ],
    }
    if schedule == "ramp":
        policy["batch_size"] = large // 2
    if schedule.startswith("wsd"):
        policy |= {
            "name": "warmup_stable_decay",
            "warmup_tokens": warmup["warmup_tokens"],
            "decay_tokens": tokens * 0.4,
        }
    warms_up = [] if schedule.startswith("wsd") else [warmup]
    transformations = [*warms_up, *moments, *steps.get(schedule, [])]
    optimizer = {"name": "adamw", "decayed": "kernels", "weight_decay": 0.1}
    if suffix == "muon":
        optimizer = {"name": ":muon"}
    # On 2 cores more sequences at a time are slower: they fill the caches.
    microbatch = "auto" if suffix == "124m" else small
    if schedule == "adaptive":
        rule = seesaw["rule"]
        policy |= {"name": "adaptive", "momentum": 0.0, "max_batch_size": large, "rule": rule}
        optimizer = optimizer if suffix == "muon" else {**optimizer, "b2": adam["b2"]}
        # A microbatch that is one small batch is measured without a loop, which is slow on CPU.
        transformations, microbatch = [], least
    model = {"layers": 2, "width": 64, "heads": 2, "vocabulary": 256, "tied": False}
    data = {"name": "bible_kjv", "sequence_tokens": sequence_tokens}
    # The run is shorter than an epoch: no sequence is shown twice.
    data |= {"train_examples": 5_000, "test_examples": 256}
    if suffix == "124m":
        model = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50_304, "dtype": "bfloat16"}
        data = {"name": "tokens", "directory": "data/tokens", "sequence_tokens": sequence_tokens}
    return ConfigDict(
        {
            "seed": 0,
            "tokens": tokens,
            "ghost_batch_examples": least,
            "data": data,
            "model": {"name": "transformer", **model},
            "optimizer": optimizer,
            "policy": policy,
            "transformations": transformations,
            "microbatch_examples_per_device": microbatch,
            "evaluation_batch_examples": 32,
            "log_every_tokens": tokens / 400,
            "evaluate_every_tokens": tokens / 5,
            "checkpoint_every_tokens": tokens / 4,
            # From these `bigbatch critical` branches.
            "keep_every_tokens": tokens / 4,
        }
    )


def _stages(tokens: int, small: int, large: int) -> dict[str, dict[str, str]]:
    """Batch sizes by tokens: doubled at 1/10, 3/10, 5/10 and 7/10, or large at 2/3 at once."""
    sizes = {k: min(large, small << (k + 1) // 2) for k in (1, 3, 5, 7)}
    doubled = [f"{tokens * k // 10}_tokens:{size}" for k, size in sizes.items()]
    texts = {
        "doubling": " ".join([f"0:{small}", *doubled]),
        "late": f"0:{small} {tokens * 2 // 3}_tokens:{large}",
    }
    return {name: {"name": "batch_stages", "batch_size": text} for name, text in texts.items()}


def muon(weight_decay: float = 0.1, beta: float = 0.95):
    """Muon for the matrices of the blocks, AdamW for embeddings, output matrix and norms.

    Its steps have AdamW's root mean square, 0.2, so that both take learning rates of one order.
    """
    import jax
    import optax

    def blocks_only(params):
        def numbers(path, leaf):
            inner = "blocks" in jax.tree_util.keystr(path) and leaf.ndim == 2
            return optax.contrib.MuonDimensionNumbers() if inner else None

        return jax.tree_util.tree_map_with_path(numbers, params)

    return lambda learning_rate: optax.contrib.muon(
        learning_rate,
        beta=beta,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=blocks_only,
    )
