"""`bigbatch plan --compile-for`: what is read of programs, bounds, mistakes; a compiler of TPUs."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch import cli
from bigbatch.commands import bench
from bigbatch.commands.compile import child, chips, read, table
from bigbatch.config.file import load_config
from bigbatch.engine import functions
from bigbatch.errors import RunError, UserError
from bigbatch.layout import memory

FEATURES, HIDDEN, OUTPUTS = 6, 32, 3
PARAMETERS = HIDDEN * (FEATURES + OUTPUTS)
# x @ first, its gradient by first; hidden @ second, and its gradients by both.
FLOPS = 2 * (2 * FEATURES * HIDDEN + 3 * HIDDEN * OUTPUTS)
CONFIG = f"""
import jax, jax.numpy as jnp, numpy as np
import bigbatch as bb


def init(key):
    first, second = jax.random.split(key)
    first = jax.random.normal(first, ({FEATURES}, {HIDDEN}))
    return {{"first": first, "second": jnp.ones(({HIDDEN}, {OUTPUTS}))}}, {{}}


def apply(params, statistics, examples, train):
    return jnp.tanh(examples["x"] @ params["first"]) @ params["second"], {{}}


def squares(outputs, examples):
    loss = jnp.sum(examples["weight"] * jnp.sum(jnp.square(outputs), axis=1))
    return {{"loss": loss, "count": jnp.sum(examples["weight"])}}


def make_task():
    return bb.Task(init, apply, squares, is_tested=True)


def make_data():
    return bb.Data({{"x": np.ones((512, {FEATURES}), np.float32)}})


def get_config(_):
    return {{
        "epochs": 2,
        "task": {{"name": ":make_task"}},
        "data": {{"name": ":make_data"}},
        "ghost_batch_examples": 4,
        "optimizer": {{"name": "momentum"}},
        "policy": {{"name": "constant", "learning_rate": 0.1, "batch_size": 128, "momentum": 0.9}},
        "microbatch_examples_per_device": 16,
        "log_every_epochs": 1,
        "evaluate_every_epochs": 1,
        "evaluation_batch_examples": 64,
        "checkpoint_every_epochs": 1,
    }}
"""
MESH = {"data": 2, "fsdp": 4}
# Lines of programs for four v5e and for two H100, shortened.
TPU = """
%fused (a: bf16[8,8], b: f32[8]) -> f32[8,8] {
  %a = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  ROOT %conv.1 = f32[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %inner = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%x, %inner)
}

ENTRY %main_spmd (p: f32[8,8], q: f32[8]) -> (f32[8,8], f32[2]) {
  %p = bf16[8,8]{1,0} parameter(0)
  %copy.3 = bf16[8,8]{0,1:T(8,128)(2,1)S(1)} copy(%p), metadata={op_name="a(b)"}
  %fusion.7 = f32[8,8]{1,0} fusion(%p, /*index=1*/%copy.3), kind=kOutput, calls=%fused
  %all-reduce.1 = (f32[8,8]{1,0}, /*index=1*/f32[2]{0}) all-reduce(%fusion.7, %q), replica_groups=[1,4]<=[4], to_apply=%add
  %send.1 = (f32[1,4,128]{2,1,0:T(4,128)}, u32[], token[]) send(%fusion.7, %after-all.2), channel_id=6, is_host_transfer=true
  %send-done.1 = token[] send-done(%send.1), channel_id=6, is_host_transfer=true
  %w = (s32[], f32[8]{0}) while(%init), condition=%cond, body=%body
  ROOT %out = (f32[8,8]{1,0}, f32[2]{0}) tuple(%all-reduce.1)
}
"""  # noqa: E501
GPU = """
%fused_reduce (a: bf16[4,8]) -> bf16[4] {
  %a = bf16[4,8]{1,0} parameter(0)
  ROOT %r = bf16[4]{0} reduce(%a, %zero), dimensions={1}, to_apply=%add
}

ENTRY %main.39_spmd (p: bf16[4,8]) -> f32[4] {
  %p = bf16[4,8]{1,0} parameter(0)
  %wrapped_transpose.2 = bf16[8,4]{1,0} fusion(%p), kind=kInput, calls=%wrapped_transpose_computation
  %cudnn-conv.1 = (bf16[4,8]{1,0}, u8[64]{0}) custom-call(%p, %wrapped_transpose.2), custom_call_target="__cudnn$convForward"
  %get-tuple-element.1 = bf16[4,8]{1,0} get-tuple-element(%cudnn-conv.1), index=0
  %input_reduce_fusion = bf16[4]{0} fusion(%get-tuple-element.1), kind=kInput, calls=%fused_reduce
  %all-reduce-start = f32[78051]{0} all-reduce-start(%c), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %all-reduce-done = f32[78051]{0} all-reduce-done(%all-reduce-start)
  %all-reduce-start.1 = (f32[4]{0}, f32[6]{0}) all-reduce-start(%c, %d), replica_groups={{0,1}}, to_apply=%add
  ROOT %all-reduce-done.1 = (f32[4]{0}, f32[6]{0}) all-reduce-done(%all-reduce-start.1)
}
"""  # noqa: E501

ATTENTION = """
import jax, jax.numpy as jnp
from bigbatch.commands.compile import child, chips
from bigbatch.engine import functions
from bigbatch.models.transformer import _attention

devices, _ = child.described(chips.target("h100:1"))
replicated = jax.sharding.NamedSharding(functions.data_mesh(devices), functions.REPLICATED)
x = jax.ShapeDtypeStruct((2, 64, 2, 32), jnp.bfloat16, sharding=replicated)
assert "__cudnn$fmhaSoftmax" in jax.jit(_attention).lower(x, x, x).compile().as_text()
"""


def test_the_text_of_a_tpu_s_program():
    assert read.collectives(TPU) == [
        {"kind": "all-reduce", "count": 1, "bytes": 4 * 66, "groups": "1 x 4", "trips": 1},
        {"kind": "all-reduce", "count": 1, "bytes": 32, "groups": "2 x 2", "trips": None},
        {"kind": "send", "count": 1, "bytes": 2048, "groups": "slices", "trips": 1},
    ]
    found = read.operations(TPU)
    # The copy, the fusion, both reductions, the send; the convolution is within the fusion.
    assert found["kernels"] == 5
    assert found["products"] == {"bf16": 1}
    assert found["copies"] == {"count": 1, "bytes": 128}
    assert found["transposes"] == {"count": 0, "bytes": 0}


def test_the_text_of_a_gpu_s_program():
    expected = {"kind": "all-reduce", "count": 2, "bytes": 4 * (78051 + 10), "groups": "1 x 2"}
    assert read.collectives(GPU) == [expected | {"trips": 1}]
    found = read.operations(GPU)
    assert found["kernels"] == 5
    assert found["products"] == {"bf16": 1}
    assert found["reductions"] == 1
    assert found["transposes"] == {"count": 1, "bytes": 64}


@pytest.mark.parametrize(
    ("groups", "over"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", "fsdp"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("{{0,1},{2,3},{4,5},{6,7}}", "?"),
        ("{}", "data,fsdp"),
        ("[1,8]<=[8]", "data,fsdp"),
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "fsdp"),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", "data"),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", "fsdp"),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", "?"),
    ],
)
def test_groups_in_every_writing_are_along_axes_of_the_mesh(groups, over):
    line = f"  %r = f32[8]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add"
    (found,) = read.collectives(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{line}\n}}", MESH)
    assert found["over"] == over


def test_what_is_started_early_counts_once():
    lines = (
        "%p = f32[2,3]{1,0} parameter(0)",
        ("%g = (f32[2,3]{1,0}, f32[16,3]{1,0}) all-gather-start(%p), replica_groups=[1,8]<=[8]"),
    )
    text = "ENTRY %main (p: f32[2,3]) -> f32[16,3] {\n  " + "\n  ".join(lines) + "\n}"
    assert read.collectives(text)[0]["bytes"] == 4 * 16 * 3


def test_what_goes_on_through_several_kernels_counts_once():
    """A TPU's text has it in each of them, with the chain's number."""
    steps = [
        f"""%step.{n} (p: f32[2,3]) -> f32[16,3] {{
  %p.{n} = f32[2,3]{{1,0}} parameter(0)
  ROOT %g.{n} = f32[16,3]{{1,0}} all-gather(%p.{n}), replica_groups=[1,8]<=[8], """
        f'frontend_attributes={{chain_id="{chain}"}}\n}}'
        for n, chain in enumerate([0, 0, 0, 1, 1])
    ]
    (found,) = read.collectives("\n\n".join(steps))
    assert (found["count"], found["bytes"]) == (2, 2 * 4 * 16 * 3)


@pytest.mark.parametrize("over", [("data",), ("fsdp",), ("data", "fsdp")])
def test_sums_in_loops_are_read_by_axis_and_trips(over):
    """What XLA makes of sums that are known."""
    mesh = jax.make_mesh((2, 4), tuple(MESH), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False
    )
    def summed(x):
        body = lambda x, _: (jnp.sin(jax.lax.psum(x, over)), None)  # noqa: E731
        once, _ = jax.lax.scan(body, x, length=7)
        return jax.lax.all_gather(once, "fsdp", tiled=True)

    text = jax.jit(summed).lower(jnp.ones(6)).compile().as_text()
    gathered, reduced = read.collectives(text, MESH)
    assert reduced["over"] == ",".join(over)
    assert (reduced["kind"], reduced["count"], reduced["bytes"]) == ("all-reduce", 1, 24)
    assert reduced["trips"] == 7
    assert (gathered["kind"], gathered["over"], gathered["trips"]) == ("all-gather", "fsdp", 1)
    assert gathered["bytes"] == 4 * 24


@settings(max_examples=15)
@given(
    size=st.integers(1, 9),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    spread=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
)
def test_operations_of_convolutions_and_their_gradients(
    size, kernel, stride, padding, spread, groups
):
    """Against counting the products of ones one by one, in a convolution of ones."""
    if (kernel - 1) * spread + 1 > size + 2 * padding:
        return
    options = {
        "window_strides": (stride,),
        "padding": [(padding, padding)],
        "rhs_dilation": (spread,),
        "feature_group_count": groups,
        "dimension_numbers": ("NWC", "WIO", "NWC"),
    }

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, **options)

    image, weights = jnp.ones((3, size, 4)), jnp.ones((kernel, 4 // groups, 6))
    forward = convolve(image, weights)
    once = 2 * int(jnp.sum(forward))
    assert read.model_flops(jax.make_jaxpr(convolve)(image, weights).jaxpr) == once
    back = jax.make_jaxpr(lambda *inputs: jax.vjp(convolve, *inputs)[1](forward))(image, weights)
    assert read.model_flops(back.jaxpr) == 3 * once


def test_operations_within_loops_and_branches():
    def program(x):
        x, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, jax.jit(jnp.dot)(x, x))

    assert read.model_flops(jax.make_jaxpr(program)(jnp.ones((4, 4))).jaxpr) == 8 * 2 * 4**3


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """This machine's virtual devices stand for four v5e, and its compiler for theirs."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(child, "described", lambda asked: (jax.devices()[: asked.devices], "1"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def compiled(config, overrides, asked):
        request = {"config": config, "overrides": overrides, "target": asked.asked}
        result = child.compiled(request, lambda text: print(text, file=sys.stderr))
        return table.judged(json.loads(json.dumps(result)), asked)

    monkeypatch.setattr(table, "compiled", compiled)


def planned(capsys, config, *flags, status=0):
    """The plan's JSON and what was said, of one command."""
    arguments = ["plan", f"--config={config}", "--json", *flags]
    assert cli.main(arguments) == status
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_a_run_on_four_devices(here, config, capsys):
    plan, said = planned(capsys, config, "--compile-for=v5e:2x2")
    accumulate, apply_update, evaluate = plan["compiled"]["programs"]
    assert accumulate["collectives"] == []
    assert evaluate["collectives"] == []
    # The gradients; loss, count and examples, each with what rounding has left.
    kinds = {found["kind"] for found in apply_update["collectives"]}
    assert kinds == {"all-reduce"}
    assert sum(found["bytes"] for found in apply_update["collectives"]) == 4 * (PARAMETERS + 6)
    assert accumulate["flops"] == 16 * FLOPS
    # Of a device: parameters and momentum, gradients, examples and what is beside them.
    state = 4 * (2 * PARAMETERS + 1)
    assert state < accumulate["needed_bytes"] < 10 * state
    assert plan["time"]["devices"] == 4
    assert plan["time"]["speeds"]["examples_per_s"] == 16 / accumulate["bound_s"]
    assert said.count("compiling") == 3
    # The second time nothing is compiled, and all is the same.
    again, said = planned(capsys, config, "--compile-for=v5e:2x2")
    assert again == plan
    assert said == ""


def test_collectives_are_those_that_a_plain_search_finds(here, config, capsys):
    plan, _ = planned(capsys, config, "--compile-for=v5e:2x2", "--config.shard=update")
    found = Counter()
    for each in plan["compiled"]["programs"][1]["collectives"]:
        found[each["kind"]] += each["count"]
    asked = chips.target("v5e:2x2")
    kept = child.Compiling.__call__
    texts = []

    def reading(self, name, traced, lowered, options):
        if name == "apply_update":
            texts.append(lowered.compile().as_text())
        return kept(self, name, traced, lowered, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child.Compiling, "__call__", reading)
        request = {"config": config, "overrides": [("shard", "update")]}
        child.compiled({**request, "target": asked.asked}, print)
    plain = r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("
    assert found == Counter(re.findall(plain, texts[0]))
    # A compiler may reduce all and keep a part.
    assert (
        {"all-reduce", "all-gather"} <= set(found) <= {"all-reduce", "reduce-scatter", "all-gather"}
    )


def test_a_planted_reduction_is_told(here, config, capsys, monkeypatch):
    add = functions.add

    def waits(total, addend):
        return add(total, jax.lax.psum(addend, functions.DATA_AXIS))

    monkeypatch.setattr(functions, "add", waits)
    assert cli.main(["plan", f"--config={config}", "--compile-for=v5e:2x2"]) == 0
    told = r"every microbatch waits for other devices: \d+ all-reduce"
    assert len(re.findall(told, capsys.readouterr().out)) == 1


def test_what_does_not_fit_is_told_beside_the_plan(here, config, capsys):
    flags = "--compile-for=v5e:2x2", "--config.device_memory_bytes=4000"
    plan, said = planned(capsys, config, *flags, status=2)
    assert plan["compiled"]["device_memory_bytes"] == 4000
    assert "microbatch_examples_per_device: given 16" in said
    auto = "--config.microbatch_examples_per_device=auto"
    assert cli.main(["plan", f"--config={config}", *flags, auto]) == 2
    assert "device_memory_bytes" in capsys.readouterr().err


def test_the_largest_that_fits_does_and_a_tenth_more_does_not(here, config, capsys):
    place = "--compile-for=v5e:2x2", "--config.device_memory_bytes=30000"

    def compiled(batch_size, share, status=0):
        shape = f"--config.policy.batch_size={batch_size}"
        share = f"--config.microbatch_examples_per_device={share}"
        return planned(capsys, config, *place, shape, share, status=status)

    found = compiled(512, "auto")[0]["compiled"]
    largest = found["largest_examples_per_device"]
    assert found["programs"][0]["needed_bytes"] <= 0.9 * 30_000
    assert 32 <= found["microbatch_examples_per_device"] < largest < 112
    # Batches of just one microbatch.
    found = compiled(4 * largest, largest)[0]["compiled"]
    assert [p.get("examples_per_device") for p in found["programs"]] == [largest, None, None]
    more = largest + max(4, largest // 40 * 4)
    _, said = compiled(4 * more, more, status=2)
    assert f"microbatch_examples_per_device: given {more}" in said


@settings(max_examples=50)
@given(
    one=st.floats(0.001, 50),
    bumps=st.floats(0, 0.3),
    unit=st.sampled_from([1, 8, 32]),
    refuses=st.booleans(),
    small=st.integers(1, 3),
)
def test_the_largest_is_found_in_few_compilations_whatever_the_memory(
    one, bumps, unit, refuses, small
):
    """Memory is no line, and a compiler may refuse, or only say what is needed."""
    limit, most, made = 1_000, 3 * 8 * 4_096, {}

    def needs(examples):
        return int(one * examples * (1 + bumps * np.sin(examples)))

    def compiled(microbatch_examples_per_device, batch_sizes=(most,)):
        (size,) = batch_sizes
        assert size >= most
        assert size % (8 * microbatch_examples_per_device) == 0
        needed = needs(microbatch_examples_per_device)
        facts = {"refused": "no" if refuses and needed > limit else None}
        facts["memory"] = dict.fromkeys(child._SIZES, 0) | {child._SIZES[0]: needed}
        made[f"accumulate {8 * microbatch_examples_per_device}"] = child.Program(facts)

    for examples in (unit * small, 2 * unit * small):
        compiled(examples, (-(-most // (8 * examples)) * 8 * examples,))
    run = types.SimpleNamespace(
        mesh=types.SimpleNamespace(size=8),
        unit_examples=unit,
        controller=None,
        plan=types.SimpleNamespace(batch_sizes=np.array([most])),
        again=compiled,
    )
    found = child._largest(run, made, limit)
    if found is None:
        assert needs(2 * unit * small) > limit or needs(most // 8) <= limit
        return
    tried = {int(name.split()[1]) // 8 for name in made}
    assert needs(found) <= limit
    assert found % unit == 0
    assert any(found < n <= found + max(unit, found // 10) and needs(n) > limit for n in tried)
    assert len(tried) < 30


def test_every_host_makes_one_range_of_a_microbatch(here, config, capsys):
    plan, _ = planned(capsys, config, "--compile-for=v5e:2x2")
    (host,) = plan["compiled"]["hosts"]
    assert host["places"] == [0, 1, 2, 3]


def test_a_compiler_s_refusal_is_a_need(here, config, capsys, monkeypatch):
    """In the words of the TPU's compiler."""
    words = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (120.00G) exceeds available HBM (15.75G)."
    )

    class Lowered:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(words)

    facts = child._compiled(Lowered(), {})
    program = {**facts, "name": "accumulate", "examples_per_device": 64, "flops": 1}
    assert facts["memory"]["temp_size_in_bytes"] == 120 * 2**30
    found = {"programs": [{**program, "needed_bytes": 1}], "target": "v5e:2x2"}
    (problem,) = table.misfits({**found, "device_memory_bytes": 2**34})
    assert "HLO temporaries (120.00G) exceeds available HBM" in str(problem)


def test_auto_takes_two_compilations_and_one_confirmation():
    tried = []

    def needed(examples):
        tried.append(examples)
        return 10_000 + 37 * examples

    found = memory.largest_that_fits(needed, unit=32, most=10**5, limit_bytes=10**6)
    assert tried == [32, 64, found]
    assert needed(found) <= 900_000 < needed(found + 32)


def test_bounds_by_hand():
    asked = chips.Target("v3:2x2", chips.CHIPS["v3"], "v3:2x2", 1, None, 8)
    sizes = {"argument_size_in_bytes": 500, "output_size_in_bytes": 400}
    program = {"refused": None, "products": {"bf16": 1}, "flops": 123, "memory": sizes}
    # A device is half a chip.
    found = table._bounds({**program, "bytes": 9_000}, asked)
    assert found["bound_s"] == pytest.approx(2e-9)
    assert found["bound_by"] == "memory"
    assert found["estimate_s"] == pytest.approx(20e-9)
    found = table._bounds({**program, "flops": 246_000, "bytes": 0}, asked)
    assert (found["bound_s"], found["bound_by"]) == (pytest.approx(4e-9), "operations")


def test_published_rates_are_below_the_bound():
    """ResNet-50 at 224 pixels, in images a second of one chip; evaluations are within the times."""
    config = load_config("configs/imagenet_resnet50.py:mlperf_lars")
    task = bench.stand_ins(config, 1)["task"]
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    kinds = {"image": ((224, 224, 3), jnp.uint8), "label": ((), jnp.int32)}
    kinds |= {"weight": ((), jnp.float32)}
    examples = {n: jax.ShapeDtypeStruct((64, *shape), kind) for n, (shape, kind) in kinds.items()}
    examples["ghost_mask"] = jax.ShapeDtypeStruct((1,), jnp.float32)

    def loss(params, statistics, examples):
        return task.loss(task.apply(params, statistics, examples, True)[0], examples)["loss"]

    traced = jax.make_jaxpr(jax.grad(loss))(*shapes, examples)
    flops = read.model_flops(traced.jaxpr) / 64
    # 4.1e9 multiplications and additions forward (He et al. 2016), twice as much backward, save for
    # the gradient by the image.
    assert flops == pytest.approx(6 * 4.1e9, rel=0.05)
    epoch = 1_281_167
    for chip, rate, source in (
        ("v2", 90 * epoch / (30 * 60) / 256, "the paper: under 30 minutes on a pod"),
        # Of mlcommons/training_results_v0.7: epochs / seconds of run_stop - run_start / chips.
        ("v3", 92 * epoch / 28.702 / 4096, "Google/results/tpu-v3-8192-JAX/resnet/result_0.txt"),
        ("v4", 44 * epoch / 108.333 / 256, "Google/results/tpu-v4-512-TF/resnet/result_0.txt"),
        ("a100", 2470, "NVIDIA/DeepLearningExamples, resnet50v1.5 for PyTorch 21.03, one of 80 GB"),
        ("a100", 2722, "NVIDIA/DeepLearningExamples, RN50v1.5 for MXNet 20.09, one card"),
        # Of mlcommons/training_results_v3.0, NVIDIA/results: tracked_stats of epoch 30, a card.
        ("h100", 294_652 / 64, "dgxh100_n8_ngc23.04_mxnet/resnet/result_0.txt"),
    ):
        share = rate * flops / chips.CHIPS[chip].bf16_flops_s
        assert 0.05 < share < 1, source


def test_what_can_be_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    places = ("topology", "slices", "devices")
    for asked, expected in {
        "v5e:16x16": ("v5e:16x16", 1, 256),
        "v4:16x16x16": ("v4:16x16x16", 1, 4096),
        "v3:32x32": ("v3:32x32", 1, 2048),
        "2*v5e:4x4": ("v5e:4x4", 2, 32),
        "h100:8": ("1x1x8", 1, 8),
        "h100:4x8": ("1x4x8", 1, 32),
    }.items():
        found = chips.target(asked)
        assert tuple(getattr(found, place) for place in places) == expected
    described = tmp_path / "card.txtpb"
    described.write_text(chips.target("h100:8").card)
    found = chips.target(f"{described}:8")
    assert found.devices == 8
    assert found.chip.memory_bytes_s == pytest.approx(chips.CHIPS["h100"].memory_bytes_s, rel=1e-3)
    assert found.chip.bf16_flops_s == pytest.approx(chips.CHIPS["h100"].bf16_flops_s, rel=0.1)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("v5e", "CHIP:SHAPE"),
        ("v55e:2x2", "nearest: 'v5e'"),
        ("h100:2x2x2", "CARD:HOSTSxCOUNT"),
        ("nowhere.txtpb:8", "No such file"),
        ("0*v5e:2x2", "of 1 to 1,048,576 chips"),
        ("h100:0", "of 1 to 1,048,576 chips"),
        ("h100:1048577", "of 1 to 1,048,576 chips"),
    ],
)
def test_mistakes_in_what_is_asked_for(asked, words, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=words):
        chips.target(asked)


@pytest.mark.parametrize("name", ["core_count", "memory_bandwidth"])
def test_a_card_without_a_peak(name, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    card = tmp_path / "card.txtpb"
    card.write_text(re.sub(rf"{name}: \d+", f"{name}: 0", chips.target("h100:8").card))
    with pytest.raises(UserError, match=rf"describes a card to XLA \({name} is 0\)"):
        chips.target(f"{card}:8")


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'bigbatch\[tpu\]'"):
        chips.target("v5e:2x2")
    with pytest.raises(UserError, match=r"pip install 'bigbatch\[cuda\]'"):
        chips.target("h100:8")


def test_a_compiler_s_process_that_is_lost(monkeypatch, tmp_path):
    """Such as one that finds another holder of libtpu."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        "echo 'ABORTED: Internal error when accessing libtpu multi-process lockfile.' >&2\n"
        "kill -ABRT $$\n"
    )
    python.chmod(0o700)
    monkeypatch.setattr(table, "_CHILD", [str(python)])
    asked = chips.Target("v5e:2x2", chips.CHIPS["v5e"], "v5e:2x2", 1, None, 4)
    with pytest.raises(RunError, match=r"status -6 \(ABORTED: .* multi-process lockfile\.\)"):
        table.compiled("own.py", [], asked)


RESNET, INCEPTION = "imagenet_resnet50.py", "imagenet_inception_resnet_v2.py"
SHARE = "--config.microbatch_examples_per_device"
needs_tpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs extra tpu")


@needs_tpu
def test_the_compiler_of_tpus(config, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan, _ = planned(capsys, config, "--compile-for=v5e:2x2")
    accumulate, apply_update, evaluate = plan["compiled"]["programs"]
    assert plan["compiled"]["device_kind"] == "TPU v5 lite"
    assert accumulate["collectives"] == evaluate["collectives"] == []
    assert [c["kind"] for c in apply_update["collectives"]] == ["all-reduce"]
    assert apply_update["collectives"][0]["groups"] == "1 x 4"
    assert apply_update["collectives"][0]["bytes"] == 4 * (PARAMETERS + 6)
    assert cli.main(["plan", f"--config={config}", "--compile-for=v5e:3x7"]) == 2
    assert "compile-for: given 'v5e:3x7'; allowed: a topology" in capsys.readouterr().err


needs_cuda = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, chips._PACKAGES["cuda"])), reason="needs extra cuda"
)


@needs_cuda
def test_the_compiler_of_gpus(config, capsys, tmp_path, monkeypatch):
    """Takes the options that training gives it, and cuDNN's attention for bfloat16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    described = tmp_path / "card.txtpb"
    described.write_text(chips.target("h100:2").card)
    place = f"--compile-for={described}:2"
    plan, _ = planned(capsys, config, place)
    accumulate, apply_update, evaluate = plan["compiled"]["programs"]
    assert plan["compiled"]["device_kind"] == "NVIDIA H100 80GB HBM3"
    assert accumulate["collectives"] == evaluate["collectives"] == []
    (found,) = apply_update["collectives"]
    size = 4 * (PARAMETERS + 6)
    sent = {"kind": "all-reduce", "count": 1, "bytes": size, "groups": "1 x 2", "trips": 1}
    assert found == sent
    # It refuses nothing: what it says is needed is compared.
    _, said = planned(capsys, config, place, "--config.device_memory_bytes=4000", status=2)
    assert "what fits into the 0 MiB" in said
    environment = os.environ | table._ENVIRONMENT
    subprocess.run([sys.executable, "-c", ATTENTION], env=environment, check=True)


@needs_tpu
def test_several_slices(config, capsys, tmp_path, monkeypatch):
    """Two of two hosts each: every host holds a range of the mesh, and chips of one slice."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan, _ = planned(capsys, config, "--compile-for=2*v5e:2x4", "--config.policy.batch_size=256")
    hosts = plan["compiled"]["hosts"]
    assert [host["slice"] for host in hosts] == [0, 0, 1, 1]
    assert [place for host in hosts for place in host["places"]] == list(range(16))
    for host in hosts:
        # A square of four neighbours.
        assert len({tuple(chip) for chip in host["chips"]}) == 4
        assert np.ptp([chip[:2] for chip in host["chips"]], axis=0).tolist() == [1, 1]
    accumulate, apply_update, _ = plan["compiled"]["programs"]
    assert accumulate["collectives"] == []
    # Within each slice, and from slice to slice.
    found = {each["kind"]: each for each in apply_update["collectives"]}
    assert {each["groups"] for each in found.values()} == {"1 x 8", "slices"}
    assert found["send"]["bytes"] >= 4 * (PARAMETERS + 6) / 8


on_eight = pytest.mark.parametrize(
    "place",
    [
        pytest.param("v5e:2x4", marks=needs_tpu),
        pytest.param("h100:8", marks=needs_cuda),
    ],
)


@on_eight
def test_layers_in_parts(place, capsys, tmp_path, monkeypatch):
    """Parameters move in groups of four, sums over groups, and nothing else but scalars."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = f"--compile-for={place}", '--config.shard={"layer": 4}', "--config.model.remat=True"
    sizes = "--config.model.layers=1", "--config.policy.batch_size=16", f"{SHARE}=2"
    plan, _ = planned(capsys, "configs/language.py:cosine", *flags, *sizes)
    accumulate, apply_update, evaluate = plan["compiled"]["programs"]
    held = plan["compiled"]["held_bytes"]
    moved = {}
    for each in accumulate["collectives"] + evaluate["collectives"]:
        # A TPU's compiler makes some scatters of permutations, whose groups are pairs.
        assert each["groups"] == "2 x 4" or each["kind"] == "collective-permute"
    for each in accumulate["collectives"]:
        moved[each["kind"]] = moved.get(each["kind"], 0) + each["bytes"]
    # Twice, and once: four bytes each (two of what a TPU multiplies in bfloat16 anyhow), of a part
    # of four what is scattered.
    gathered = moved.pop("all-gather")
    assert 0.8 * 4 * held["params"] < gathered <= 2 * 4 * held["params"]
    # A compiler may reduce all and keep a part.
    assert 0.95 * held["params"] < sum(moved.values()) < 1.05 * 4 * held["params"]
    summed = {}
    for each in apply_update["collectives"]:
        summed[each["groups"]] = summed.get(each["groups"], 0) + each["bytes"]
    assert 0.95 * held["params"] < summed.pop("4 x 2") < 1.05 * held["params"]
    assert sum(summed.values()) < 0.1 * held["params"]


@on_eight
def test_layers_that_devices_compute_together(place, capsys, tmp_path, monkeypatch):
    """Matrices move in groups of four that have the same half, activations among two neighbours."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = f"--compile-for={place}", '--config.shard={"layer": 8, "model": 2}'
    sizes = "--config.model.layers=1", "--config.policy.batch_size=16", f"{SHARE}=2"
    config = "configs/language.py:cosine"
    plan, _ = planned(capsys, config, *flags, *sizes, "--config.model.remat=True")
    accumulate, apply_update, evaluate = plan["compiled"]["programs"]
    moved = Counter()
    for each in accumulate["collectives"]:
        moved[each["groups"]] += each["bytes"] * (each["kind"] == "all-gather")
    model = load_config(config).model
    matrices = 8 * plan["compiled"]["held_bytes"]["params"] - 4 * model.vocabulary * model.width
    # Once or twice, two bytes an element or four.
    assert matrices // 4 < moved.pop("2 x 4") < matrices
    # Into both halves of the block, again for the gradient of what was computed anew, and out.
    assert moved.pop("4 x 2") > 4 * 2 * 2 * 128 * model.width
    kinds = {each["kind"] for each in evaluate["collectives"] if each["groups"] == "4 x 2"}
    assert kinds & {"reduce-scatter", "all-reduce"}
    assert {each["groups"] for each in apply_update["collectives"]} <= {"1 x 8", "all"}


REFUSED = """
import json, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from bigbatch.commands.compile import child, chips
from bigbatch.engine.functions import data_mesh

for shape in ("v2:2x2", "v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
    asked = chips.target(shape)
    devices, _ = child.described(asked)
    assert len(devices) == asked.devices
    whole = NamedSharding(data_mesh(devices), PartitionSpec())
    x = jax.ShapeDtypeStruct((50 * 2**30,), jnp.float32, sharding=whole)
    facts = child._compiled(jax.jit(lambda x: (jnp.sin(x), jnp.sum(x))).lower(x))
    print(json.dumps([shape, facts["refused"], facts["memory"]["temp_size_in_bytes"]]))
"""


@needs_tpu
def test_chips_have_the_devices_and_the_memory_that_their_compiler_says():
    command, environment = [sys.executable, "-c", REFUSED], os.environ | table._ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert [shape.partition(":")[0] for shape, _, _ in told] == list(chips.CHIPS)[:7]
    for shape, refused, needed_bytes in told:
        chip = chips.CHIPS[shape.partition(":")[0]]
        assert needed_bytes == 400 * 2**30
        gib = float(re.search(r"exceeds available HBM \(([\d.]+)G\)", refused)[1])
        assert chip.memory_bytes == pytest.approx(gib * 2**30 * chip.devices)


@needs_tpu
@pytest.mark.long
@pytest.mark.parametrize(
    ("experiment", "shape", "share", "options"),
    [
        (f"{RESNET}:mlperf_lars", "v4:16x16x16", 16, ("--config.ghost_batch_examples=16",)),
        (f"{RESNET}:mlperf_lars", "v5e:16x16", 64, ()),
        (f"{RESNET}:decay", "v5e:16x16", 32, ("--config.shard=update",)),
        (f"{RESNET}:decay", "v5e:16x16", 32, ("--config.reproducible=True",)),
        (f"{INCEPTION}:momentum_0.9", "v5e:16x16", 64, ()),
    ],
)
def test_runs_of_pods_wait_once_an_update(experiment, shape, share, options, capsys):
    """Minutes of two cores each; what was compiled before is read from the user's cache."""
    flags = f"--compile-for={shape}", "--config.model.dtype=bfloat16", *options
    plan, _ = planned(capsys, f"configs/{experiment}", *flags, f"{SHARE}={share}")
    *accumulates, apply_update, evaluate = plan["compiled"]["programs"]
    for program in (*accumulates, evaluate):
        assert program["collectives"] == []
    found = Counter()
    for each in apply_update["collectives"]:
        found[each["kind"]] += each["count"]
    reduced = sum(c["bytes"] for c in apply_update["collectives"] if c["kind"] == "all-reduce")
    gradients = plan["time"]["gradient_bytes"]
    if "--config.shard=update" in options:
        # All is scattered and gathered once. A TPU's compiler makes either a sum where it likes.
        for each in apply_update["collectives"]:
            if each["kind"] == "reduce-scatter":
                reduced += each["bytes"] * int(each["groups"].split(" x ")[1])
            reduced += each["bytes"] if each["kind"] == "all-gather" else 0
        assert 1.99 * gradients < reduced < 2.02 * gradients
    elif "--config.reproducible=True" in options:
        # The sums in three parts, and the largest of their terms.
        assert set(found) == {"all-reduce"}
        assert 3 * gradients < reduced < 3.06 * gradients
    else:
        # Each element once, in as many calls as the compiler likes.
        assert set(found) == {"all-reduce"}
        assert gradients < reduced < 1.02 * gradients


@needs_tpu
@pytest.mark.long
def test_shared_ghost_batches_wait_for_neighbours_only(capsys):
    """MLPerf's ghost batch of 64, of 16 examples on each of 4 chips."""
    flags = "--compile-for=v4:16x16x16", "--config.model.dtype=bfloat16", f"{SHARE}=16"
    plan, _ = planned(capsys, f"configs/{RESNET}:mlperf_lars", *flags)
    accumulate = plan["compiled"]["programs"][0]
    assert {each["groups"] for each in accumulate["collectives"]} == {"1024 x 4"}
    # A value, mean and variance of each channel from each of the four, and back for the gradient.
    statistics = plan["compiled"]["held_bytes"]["running statistics"]
    moved = {each["kind"]: each["bytes"] for each in accumulate["collectives"]}
    assert moved == dict.fromkeys(("all-gather", "all-reduce"), 4 * 3 * statistics // 2)


@needs_tpu
@pytest.mark.long
@pytest.mark.parametrize(
    ("experiment", "batch_size"),
    [
        ("fashion_mnist_wrn16_4.py:decay", 2**18),
        (f"{RESNET}:decay", 2**13),
        (f"{INCEPTION}:decay", 2**11),
    ],
)
def test_the_largest_microbatch_of_16_gb(experiment, batch_size, capsys):
    """A tenth more, in whole ghost batches, is refused by the compiler."""

    def compiled(batch_size, share, status=0):
        flags = "--compile-for=v5e:2x2", f"{SHARE}={share}", "--config.model.dtype=bfloat16"
        size = f"--config.policy.batch_size={batch_size}"
        return planned(capsys, f"configs/{experiment}", *flags, size, status=status)

    found = compiled(batch_size, "auto")[0]["compiled"]
    largest, ghost = found["largest_examples_per_device"], load_config(f"configs/{experiment}")
    ghost = ghost.ghost_batch_examples
    assert found["microbatch_examples_per_device"] <= largest
    compiled(4 * largest, largest)
    more = largest + max(ghost, largest // 10 // ghost * ghost)
    plan, said = compiled(4 * more, more, status=2)
    assert plan["compiled"]["programs"][0]["refused"]
    assert f"microbatch_examples_per_device: given {more}" in said
