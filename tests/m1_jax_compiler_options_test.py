"""Options of our own programs: which libtpu takes, what a user's own do, and where none are."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.execution import compiled_program
from m1_jax import compiler_options
from m1_jax.plan import aot, topology
from pallas_kernels.lightning_attention import tiling

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SCOPED_VMEM = "xla_tpu_scoped_vmem_limit_kib"
CPU_OPTION = "xla_embed_ir_in_executable"  # one that the CPU's compiler takes


@pytest.fixture(autouse=True)
def no_memory_of_libtpu(monkeypatch):
    monkeypatch.setattr(compiler_options, "_accepted_options", {})
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)


def make_device(name):
    pytest.importorskip("libtpu")
    return topology.get_slice_devices(topology.parse_slice(name))[0]


@pytest.mark.parametrize("generation", list(tiling.MATRIX_UNIT_SIDES))
def test_libtpu_takes_every_option_of_a_generation(generation, caplog):
    device = make_device(SLICES[generation])
    assert compiler_options.options_for(device) == compiler_options.COMPILER_OPTIONS[generation]
    assert not caplog.records


def test_an_option_that_libtpu_does_not_know_is_left_out_with_a_warning(monkeypatch, caplog):
    options = {SCOPED_VMEM: 32_768, "xla_tpu_of_tomorrow": True}
    monkeypatch.setitem(compiler_options.COMPILER_OPTIONS, "v5e", options)
    device = make_device("v5e:2x2")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # the second call asks no more
            assert compiler_options.options_for(device) == {SCOPED_VMEM: 32_768}
    (warning,) = caplog.messages
    assert re.search(r"libtpu refuses xla_tpu_of_tomorrow \(.*without it", warning)


def test_options_that_the_user_names_are_the_users(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--xla_other=1 --{SCOPED_VMEM}=98304")
    options = compiler_options.options_for(make_device("v5p:2x2x1"))
    assert options == {
        name: value
        for name, value in compiler_options.COMPILER_OPTIONS["v5p"].items()
        if name != SCOPED_VMEM
    }


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v9"])
def test_other_tpus_and_other_platforms_have_none(kind):
    class Device:
        platform, device_kind = "tpu", kind

    assert compiler_options.options_for(Device()) == {}
    assert compiler_options.options_for(jax.devices()[0]) == {}
    assert compiler_options.options_of_arguments((np.ones(2), jnp.ones(2), None)) == {}


def test_the_scoped_vmem_reaches_the_compiler():
    # A grouped product of the released size: its column tile tells how much VMEM it may take.
    device = make_device("v5p:2x2x1")
    where = jax.sharding.SingleDeviceSharding(device)
    rows, matrices, sizes = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for shape, dtype in (
            ((1024, 6144), jnp.bfloat16),
            ((2, 6144, 9216), jnp.bfloat16),
            ((2,), jnp.int32),
        )
    )
    traced = jax.jit(jax.lax.ragged_dot).trace(rows, matrices, sizes)
    texts = [
        aot.compile_program(traced, 2.0**37, options).hlo_text
        for options in (None, compiler_options.options_for(device))
    ]
    assert ["128,6144,768" in text for text in texts] == [False, True]


def test_programs_run_with_the_options_of_their_arguments(monkeypatch):
    asked = []

    def options_for(device):
        asked.append(device)
        return {CPU_OPTION: True}

    monkeypatch.setattr(compiler_options, "options_for", options_for)
    double = compiler_options.jit_for_device(lambda x, *, times: x * times, static_argnames="times")
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(double(x, times=2), 2 * x)
    assert len(asked) == 1
    assert double._cache_size() == 0  # of the form without options
    # Inside of another program there is no place for options, and JAX would refuse them.
    np.testing.assert_array_equal(jax.jit(lambda x: double(x, times=2))(x), 2 * x)
    assert len(asked) == 1
    assert double.trace(x, times=2).lower().compile()(x).shape == x.shape
    program = compiled_program.CompiledProgram(lambda x: x + 1, (), x)
    np.testing.assert_array_equal(program(x), x + 1)
    assert len(asked) == 2


def test_an_option_of_a_tpu_would_be_refused_on_cpu():
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={SCOPED_VMEM: 1})(jnp.ones(2))
