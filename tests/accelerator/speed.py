"""How fast an update of each network is, by the examples of a call; and PyTorch's.

An update is accumulate and apply_update on one microbatch that lies on the card, as a plan of that
batch size has them; PyTorch's (`torch_peers`) is forward, loss, backward and its optimizer. Same
network, same card, same minutes, by turns.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from bigbatch.commands.compile import chips, read
from tests.accelerator import runs


class Network(NamedTuple):
    """What is measured of a network.

    Attributes:
      config: whose task and optimizer it is.
      changes: of its fields.
      ghost: examples of a ghost batch, where a call has as many.
      sizes: examples of a call, what matters most first. The first two have a peer, the first one
        in float32 too.
    """

    config: str
    changes: Mapping[str, Any]
    ghost: int
    sizes: tuple[int, ...]


def _language(layers: int, width: int, heads: int, vocabulary: int, length: int) -> dict[str, Any]:
    model = {"layers": layers, "width": width, "heads": heads, "vocabulary": vocabulary}
    # As GPT-2 and the peer.
    model["tied"] = True
    # Of the longest sequences there are few to test on.
    data = {"data.sequence_tokens": length, "data.test_examples": 100}
    return {f"model.{n}": v for n, v in model.items()} | data


NETWORKS = {
    "wrn16_4": Network(
        "configs/cifar10.py:decay", {}, 128, (1024, 256, 4096, 128, 512, 2048, 64, 32, 8192)
    ),
    "resnet50": Network("configs/imagenet_resnet50.py:decay", {}, 32, (256, 128, 64, 512)),
    "transformer": Network(
        "configs/language.py:cosine", _language(12, 768, 12, 50_304, 1_024), 1, (16, 32, 8)
    ),
}
TOYS = {
    "wrn16_4": Network("configs/digits.py:decay", {}, 32, (32,)),
    "resnet50": Network(
        "configs/imagenet_resnet50.py:decay", {"model.depth": 18, "data.image_size": 32}, 4, (4,)
    ),
    "transformer": Network("configs/language.py:cosine", _language(1, 32, 2, 256, 16), 1, (2,)),
}


def rows(toy: bool, name: str) -> Iterator[dict[str, Any]]:
    """A row for each size, dtype and trainer of a network."""
    network = (TOYS if toy else NETWORKS)[name]
    budget_s = 0 if toy else 1.5
    for number, size in enumerate(network.sizes):
        for dtype in ("bfloat16", "float32")[: 1 if number or toy else 2]:
            flops: dict[str, int] = {}
            own = {"ghost_batch_examples": min(network.ghost, size), "model.dtype": dtype}

            def compiler(
                name: str, traced: Any, lowered: Any, options: Any, flops: Any = flops
            ) -> Any:
                flops[name.split()[0]] = read.model_flops(traced.jaxpr)
                return lowered.compile(options)

            run = runs.run_of(network.config, own | network.changes, [size], compiler=compiler)
            mib = run.programs.device_bytes["accumulate"] / 2**20
            call_flops, tokens = flops["accumulate"], run.tokens_per_example
            if tokens:
                call_flops = size * _transformer_flops(network.changes, run)
            facts = {"dtype": dtype if dtype == "bfloat16" else "tf32", "examples a call": size}
            found = (call_flops, tokens or 1)
            seconds = runs.seconds_of(runs.bare(run), budget_s)
            yield {"trainer": "bigbatch", **facts, **_rates(seconds, size, dtype, *found, mib)}
            del run
            if number < 2 and importlib.util.find_spec("torch"):
                from tests.accelerator import torch_peers

                update, peak_mib = torch_peers.trainer(name, size, dtype, toy=toy)
                rates = _rates(runs.seconds_of(update, budget_s), size, dtype, *found, peak_mib())
                yield {"trainer": "PyTorch", **facts, **rates}


def _transformer_flops(changes: Mapping[str, Any], run: Any) -> int:
    """Of an example, forward and backward: Chowdhery et al. 2022, appendix B.

    Nothing that is computed twice counts, and of the attention both halves.
    """
    shapes = jax.tree.leaves(run.programs.state_shapes.params)
    # The embeddings are the output matrix too.
    parameters = sum(leaf.size for leaf in shapes if leaf.ndim == 2)
    layers, width, length = (
        changes[name] for name in ("model.layers", "model.width", "data.sequence_tokens")
    )
    return length * (6 * parameters + 12 * layers * width * length)


def _rates(
    seconds: Any, size: int, dtype: str, flops: int, tokens: int, mib: float
) -> dict[str, Any]:
    low, middle, high = size / seconds[::-1]
    card, chip = jax.devices()[0], chips.CHIPS["h100"]
    peak_s = chip.bf16_flops_s if dtype == "bfloat16" else chip.float32_flops_s
    return {
        "examples/s": round(middle, 1),
        "quartiles": f"{low:,.0f} to {high:,.0f}",
        "tokens/s": round(middle * tokens) if tokens > 1 else None,
        "GFLOP an example": flops / size / 1e9,
        "share of H100's peak": None if card.platform == "cpu" else middle * flops / size / peak_s,
        "MiB": round(mib),
    }
