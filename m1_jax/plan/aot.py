"""Compiling for TPUs that are not there: memory, time, and the text of the program."""

import contextlib
import dataclasses
import glob
import pathlib
import re
import tempfile
import time

import jax
import jax.numpy as jnp

_PROBE_BYTES = 2**42  # more than any chip has


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """What the compiler says; bytes and operations are those of one chip.

    needed: HBM for all; text: the optimised HLO; flops: its own count, None if it did not fit;
    cpu_secs: of all threads, which other processes do not stretch.
    """

    fits: bool
    needed_bytes: float
    limit_bytes: float
    argument_bytes: float | None
    temp_bytes: float | None
    flops: float | None
    hlo_text: str
    compile_secs: float
    compile_cpu_secs: float


def compile_program(traced, limit_bytes: float) -> CompileResult:
    """Compile for a TPU, keeping the compiler's own dump of the program.

    A dump, because `as_text` of some TPU programs fails inside XLA, and because it is there even
    of a program that does not fit.
    """
    started, cpu_started = time.perf_counter(), time.process_time()

    def spent():
        return time.perf_counter() - started, time.process_time() - cpu_started

    with tempfile.TemporaryDirectory() as dump, _disable_compile_cache():
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            program = compile_for_tpu(traced, compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            too_much = parse_out_of_memory(str(error))
            if too_much is None:
                raise
            return CompileResult(False, *too_much, None, None, None, _read_dump(dump), *spent())
        secs = spent()
        text = _read_dump(dump)
    memory = program.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    needed = arguments + kept + temporaries + memory.generated_code_size_in_bytes
    count = (program.cost_analysis() or {}).get("flops")
    return CompileResult(
        needed <= limit_bytes, needed, limit_bytes, arguments, temporaries, count, text, *secs
    )


def _read_dump(dump: str) -> str:
    """Return the optimised text of the largest module: others are parts cut out of it."""
    found = glob.glob(f"{dump}/*.after_optimizations.txt")
    if not found:
        return ""
    return pathlib.Path(max(found, key=lambda path: pathlib.Path(path).stat().st_size)).read_text()


@contextlib.contextmanager
def _disable_compile_cache():
    """What a compilation cache holds is not compiled, so dumps nothing and takes no time."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def probe_hbm_limit_bytes(device) -> float:
    """Return the memory that the compiler grants one device, from its refusal to exceed it."""
    one = jax.sharding.SingleDeviceSharding(device)
    large = jax.ShapeDtypeStruct((_PROBE_BYTES // 4,), jnp.float32, sharding=one)
    try:
        compile_for_tpu(jax.jit(lambda x: x + 1).trace(large))
    except jax.errors.JaxRuntimeError as error:
        found = parse_out_of_memory(str(error))
        if found is not None:
            return found[1]
        raise
    raise AssertionError(f"{device} took {_PROBE_BYTES} bytes")


def compile_for_tpu(traced, **kwargs):
    return traced.lower(lowering_platforms=("tpu",)).compile(**kwargs)


def parse_out_of_memory(message: str) -> tuple[float, float] | None:
    """Return (needed, available) bytes from a compiler's RESOURCE_EXHAUSTED; None: another error.

    What is needed covers arguments and results, whatever the message calls it.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    number = r"([\d.]+)\s*([KMGT]?)i?B?"
    for form in (
        rf"\({number}\) exceeds available HBM \({number}\)",
        rf"Used {number} of {number}",
    ):
        found = re.search(form, message)
        if found:
            sizes = [float(found[i]) * 1024 ** " KMGT".index(found[i + 1] or " ") for i in (1, 3)]
            return sizes[0], sizes[1]
    return None
