"""Compiling for TPUs that are not there: memory, time, and the program's text."""

import contextlib
import dataclasses
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_PROBE_BYTES = 2**42  # more than any chip has


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """What the compiler reports. Bytes and operations are those of one chip.

    Fields that may be None are None where the program does not fit.

    Attributes:
      fits: whether the program fits into HBM.
      needed_bytes: HBM for arguments, results, temporaries and code.
      limit_bytes: HBM that the compiler grants.
      argument_bytes: the part of `needed_bytes` that arguments take.
      temp_bytes: the part of `needed_bytes` that temporaries take.
      flops: the compiler's own count, which takes a loop's body once.
      hlo_text: the optimised program. Empty where the compiler wrote none.
      codegen_text: the program as it was scheduled, with the compiler's estimates of its parts.
        Empty where the compiler wrote none, as for a program that does not fit.
      compile_secs: time by the clock.
      compile_cpu_secs: CPU time of all threads. Other processes do not stretch it, as they stretch
        the clock's time.
    """

    fits: bool
    needed_bytes: float
    limit_bytes: float
    argument_bytes: float | None
    temp_bytes: float | None
    flops: float | None
    hlo_text: str
    codegen_text: str
    compile_secs: float
    compile_cpu_secs: float


def compile_program(
    traced: jax.stages.Traced,
    limit_bytes: float,
    compiler_options: Mapping[str, Any] | None = None,
) -> CompileResult:
    """Compile for a TPU, and read the program's text from the compiler's own dump.

    `as_text` fails inside XLA for some TPU programs. The dump exists for these, and also for a
    program that does not fit.
    """
    start_secs, start_cpu_secs = time.perf_counter(), time.process_time()

    def measure_secs() -> tuple[float, float]:
        return time.perf_counter() - start_secs, time.process_time() - start_cpu_secs

    with tempfile.TemporaryDirectory() as dump, _disable_compile_cache():
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True, **(compiler_options or {})}
        try:
            program = compile_for_tpu(traced, compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            # A program that is too large is an answer, and the message has its size.
            sizes = parse_out_of_memory(str(error))
            if sizes is None:
                raise
            texts = _read_dump(dump, "after_optimizations"), _read_dump(dump, "after_codegen")
            return CompileResult(False, *sizes, None, None, None, *texts, *measure_secs())
        secs = measure_secs()
        texts = _read_dump(dump, "after_optimizations"), _read_dump(dump, "after_codegen")
    memory = program.memory_analysis()
    assert memory is not None  # None is for backends without statistics, and TPUs have them
    # An output that takes the memory of a donated argument is counted with the arguments.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    needed = arguments + results + temporaries + memory.generated_code_size_in_bytes
    count = (program.cost_analysis() or {}).get("flops")
    return CompileResult(
        needed <= limit_bytes, needed, limit_bytes, arguments, temporaries, count, *texts, *secs
    )


def _read_dump(dump: str, stage: str) -> str:
    """Return a stage's text of the largest module. The smaller ones are parts cut out of it."""
    files = list(pathlib.Path(dump).glob(f"*.{stage}.txt"))
    return max(files, key=lambda file: file.stat().st_size).read_text() if files else ""


@contextlib.contextmanager
def _disable_compile_cache():
    """Compile in any case: a program from the compilation cache has no dump and takes no time."""
    was_enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was_enabled)


def probe_hbm_limit_bytes(device: Any) -> float:
    """Return the memory that the compiler grants one device, from its refusal to exceed it.

    A device of a topology has no memory statistics, and only the error message names the limit.
    """
    on_device = jax.sharding.SingleDeviceSharding(device)
    too_large = jax.ShapeDtypeStruct((_PROBE_BYTES // 4,), jnp.float32, sharding=on_device)
    try:
        compile_for_tpu(jax.jit(lambda x: x + 1).trace(too_large))
    except jax.errors.JaxRuntimeError as error:
        sizes = parse_out_of_memory(str(error))
        if sizes is None:
            raise
        return sizes[1]
    raise AssertionError(f"{device} took {_PROBE_BYTES} bytes")


def compile_for_tpu(traced: jax.stages.Traced, **kwargs) -> jax.stages.Compiled:
    """Lower for TPUs, whatever backend this process has, and compile."""
    return traced.lower(lowering_platforms=("tpu",)).compile(**kwargs)


def parse_out_of_memory(message: str) -> tuple[float, float] | None:
    """Return (needed, available) bytes from a compiler's RESOURCE_EXHAUSTED, or None.

    The needed bytes are those of arguments, results and temporaries together. None says that the
    error is another one, or names no sizes.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    # Two groups each: the number, and the letter of its unit, if any.
    size = r"([\d.]+)\s*([KMGT]?)i?B?"
    for pattern in (
        rf"\({size}\) exceeds available HBM \({size}\)",
        rf"Used {size} of {size}",
    ):
        match = re.search(pattern, message)
        if match:
            needed, limit = (
                float(match[i]) * 1024 ** " KMGT".index(match[i + 1] or " ") for i in (1, 3)
            )
            return needed, limit
    return None
