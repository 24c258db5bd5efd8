"""Measures what `docs/why.md` says of libraries that do what parts of this repository do.

    python benchmarks/kept_libraries.py [attention] [safetensors] [workers] [http] [partition]

Without arguments all of them run, in about two minutes on a CPU. pebble, requests and httpx are no
dependencies of ours; those that are not installed are left out.

  attention    `ring_attention` beside jax's splash attention in interpret mode, one device
  safetensors  `checkpoints.release` beside the safetensors package: part of a tensor; damaged files
  workers      the rewards' `pool` beside pebble and concurrent.futures: calls that misbehave
  http         the rewards' `client` beside requests and httpx: an answer that drips
  partition    `trainable` beside `nnx.split` with a filter, inside a jitted gradient
"""

import concurrent.futures
import contextlib
import http.server
import importlib
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

# By path, the script's own directory comes first; the packages lie above it.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

MARK = pathlib.Path(tempfile.gettempdir()) / "kept_libraries_mark"
LIMIT_SECS = 1.0  # of a call in a worker


def take_best_secs(function: Callable[[], Any], repeats: int = 5) -> float:
    """Return the seconds of the fastest call, after one that compiles."""
    function()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


# --- attention ---


def measure_attention() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    from m1_jax import ring_attention

    num_heads, num_kv, size = 4, 2, 128
    for length in (512, 2048):
        keys = jax.random.split(jax.random.key(0), 3)
        q = jax.random.normal(keys[0], (num_heads, length, size))
        k, v = (jax.random.normal(key, (num_kv, length, size)) for key in keys[1:])
        documents = jnp.asarray(np.repeat([1, 2], length // 2), jnp.int32)
        causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * num_heads)
        blocks = splash.BlockSizes(*(256,) * 8)

        def run_ours(q, k, v, documents=documents, length=length):
            positions = jnp.arange(length, dtype=jnp.int32)[None]
            arrays = jnp.moveaxis(q, 0, 1)[None], k[None], v[None]
            ids = documents[None], documents[None]
            o = ring_attention.causal_attention(*arrays, positions, positions, *ids)
            return jnp.moveaxis(o[0], 1, 0)

        def run_splash(q, k, v, documents=documents, causal=causal, blocks=blocks):
            kernel = splash.make_splash_mha(
                causal, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=True
            )
            return kernel(q / np.sqrt(size), k, v, splash.SegmentIds(documents, documents))

        difference = float(jnp.abs(run_ours(q, k, v) - run_splash(q, k, v)).max())
        print(f"{length} tokens, {num_heads} heads of {size}: largest difference {difference:.1e}")
        for name, attend in (("ours", run_ours), ("splash, interpreted", run_splash)):
            forward = jax.jit(attend)
            gradient = jax.jit(jax.grad(lambda q, k, v, f=attend: f(q, k, v).sum(), (0, 1, 2)))
            times = [
                take_best_secs(lambda f=f, q=q, k=k, v=v: jax.block_until_ready(f(q, k, v)))
                for f in (forward, gradient)
            ]
            print(f"  {name}: {times[0] * 1e3:.0f} ms, with gradients {times[1] * 1e3:.0f} ms")

    def report(case: str, call: Callable[[], Any]) -> None:
        try:
            print(f"  {case}: accepted, {call()}")
        except Exception as error:
            print(f"  {case}: {type(error).__name__}: {error}")

    def make_kernel(length: int, **options):
        causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * num_heads)
        return splash.make_splash_mha(causal, head_shards=1, q_seq_shards=1, **options)

    def attend_zeros(kernel, length: int):
        q, k = jnp.zeros((num_heads, length, size)), jnp.zeros((num_kv, length, size))
        return jax.tree.map(jnp.shape, kernel(q, k, k))

    print("splash attention:")
    report("on the CPU, compiled", lambda: attend_zeros(make_kernel(512), 512))
    report("500 tokens", lambda: attend_zeros(make_kernel(500, interpret=True), 500))
    residuals = make_kernel(512, interpret=True, save_residuals=True)
    report("log-sum-exp returned", lambda: attend_zeros(residuals, 512))
    k = jnp.zeros((num_kv, 512, size))
    report(
        "its gradient",
        lambda: jax.grad(lambda q: residuals(q, k, k)[0].sum())(jnp.zeros((num_heads, 512, size))),
    )
    mask = jnp.tril(jnp.ones((num_heads, 512, 512), bool))
    dynamic = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=True)
    blocks_shape = dynamic.fwd_mask_info.partial_mask_blocks.shape
    print(f"  a mask that is known at run time: stored as booleans {blocks_shape}")


# --- safetensors ---


def write_safetensors(path: pathlib.Path, header: bytes, data: bytes) -> pathlib.Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def read_part(reader: str, path: pathlib.Path) -> None:
    """Read 128 of 4,096 columns of a matrix; print seconds and the growth of peak memory."""
    import safetensors

    from m1_jax.checkpoints import release

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if reader == "release":
        (tensor,) = release.read_shard(path).tensors
        part = tensor.read()[:, :128].copy()
    else:
        with safetensors.safe_open(path, "np") as file:
            if reader == "get_slice":
                part = file.get_slice("a")[:, :128].copy()
            else:
                part = file.get_tensor("a")[:, :128].copy()
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"  {reader}: {seconds * 1e3:.0f} ms, peak memory + {grown:.0f} MiB, {part.shape}")


def measure_safetensors() -> None:
    import numpy as np
    import safetensors

    from m1_jax.checkpoints import release

    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        rows, columns = 2**15, 2**12  # 256 MiB in bfloat16
        spec = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}
        path = write_safetensors(
            folder / "large", json.dumps({"a": spec}).encode(), bytes(2 * rows * columns)
        )
        print("128 of 4,096 columns of a matrix of 256 MiB, each in a process of its own:")
        for reader in ("release", "get_slice", "get_tensor"):
            command = [sys.executable, __file__, "read-part", reader, str(path)]
            subprocess.run(command, check=True)
        numbers = np.arange(8, dtype=np.float32).tobytes()

        def header(**tensors) -> bytes:
            return json.dumps(
                {
                    name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
                    for name, (dtype, shape, offsets) in tensors.items()
                }
            ).encode()

        good = header(a=("F32", [8], [0, 32]))
        cases = {
            "truncated": (good, numbers[:20]),
            "too long": (good, numbers + b"more"),
            "gap": (header(a=("F32", [4], [0, 16]), b=("F32", [3], [20, 32])), numbers),
            "overlap": (header(a=("F32", [4], [0, 16]), b=("F32", [5], [12, 32])), numbers),
            "shape": (header(a=("F32", [9], [0, 32])), numbers),
            "integers": (header(a=("I64", [4], [0, 32])), numbers),
        }
        print("damaged files:")
        for name, (head, data) in cases.items():
            path = write_safetensors(folder / "damaged", head, data)
            answers = []
            for read in (release.read_shard, lambda path: safetensors.safe_open(path, "np")):
                try:
                    read(path)
                    answers.append("read")
                except Exception as error:
                    answers.append(str(error).replace(directory, "DIR"))
            print(f"  {name}:\n    release: {answers[0]}\n    package: {answers[1]}")


# --- workers: functions that are called in them ---


def hang(ignore: bool = False) -> None:
    """Never return; without SIGTERM, too, as a program that catches it."""
    if ignore:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def hang_with_child() -> None:
    """Hang beside a child process, whose id goes into a file."""
    child = subprocess.Popen(["sleep", "60"])
    MARK.write_text(str(child.pid))
    time.sleep(60)


class Intruder:
    """An answer that runs code where it is unpickled."""

    def __reduce__(self):
        return eval, (f"__import__('pathlib').Path({str(MARK)!r}).write_text('intruder')",)


def answer_with_code():
    return Intruder()


def answer_at_length() -> str:
    return "x" * 2**24


def die() -> None:
    os._exit(1)


class WorkerStillRuns(Exception):
    """The caller's time limit passed, and the worker goes on."""


CASES = {
    "hangs": (hang, ()),
    "hangs and ignores SIGTERM": (hang, (True,)),
    "hangs with a child": (hang_with_child, ()),
    "dies": (die, ()),
    "answers with a pickle that runs code": (answer_with_code, ()),
    "answers with 16 MiB": (answer_at_length, ()),
}


def try_call(call: Callable[[Callable, tuple], Any], case: str) -> str:
    """Return what came of a call, after how long, and what it left behind."""
    function, arguments = CASES[case]
    MARK.unlink(missing_ok=True)
    started = time.perf_counter()
    try:
        value = call(function, arguments)
        outcome = f"{len(value)} characters" if isinstance(value, str) else f"got {value!r:.40}"
    except Exception as error:
        outcome = type(error).__name__
    outcome += f" after {time.perf_counter() - started:.1f} s"
    time.sleep(0.2)
    if MARK.exists():
        text = MARK.read_text()
        if text == "intruder":
            outcome += ", its code ran in the caller"
        elif is_running(int(text)):
            outcome += ", child lives on"
            os.kill(int(text), signal.SIGKILL)
    return outcome


def is_running(pid: int) -> bool:
    """Return whether a process runs; a dead one may wait in /proc for its parent, as state Z."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def measure_workers() -> None:
    from train.rl.rewards import pool as pool_lib

    name = pathlib.Path(__file__).stem
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    functions = importlib.import_module(name)  # as workers know them, not as __main__
    context = multiprocessing.get_context("spawn")
    pebble: Any = None
    with contextlib.suppress(ImportError):
        pebble = importlib.import_module("pebble")

    def call_ours(function, arguments):
        return ours.submit(f"{name}:{function.__name__}", *arguments).result()

    def call_pebble(function, arguments):
        function = getattr(functions, function.__name__)
        return process_pool.schedule(function, args=arguments, timeout=LIMIT_SECS).result()

    def call_futures(function, arguments):
        function = getattr(functions, function.__name__)
        executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
        try:
            executor.submit(abs, 0).result()  # starts the worker, outside of the limit
            workers = list((executor._processes or {}).values())
            return executor.submit(function, *arguments).result(timeout=LIMIT_SECS)
        except concurrent.futures.TimeoutError:
            if workers[0].is_alive():
                raise WorkerStillRuns from None
            raise
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.kill()

    ours = pool_lib.WorkerPool(1, LIMIT_SECS)
    process_pool = pebble.ProcessPool(max_workers=1, context=context) if pebble else None
    for case in CASES:
        print(f"  {case}")
        print(f"    pool: {try_call(call_ours, case)}")
        if process_pool is not None:
            process_pool.schedule(abs, args=(0,)).result()  # starts the worker first
            print(f"    pebble: {try_call(call_pebble, case)}")
        print(f"    concurrent.futures: {try_call(call_futures, case)}")
    ours.close()
    if process_pool is not None:
        process_pool.stop()
        process_pool.join()


# --- http ---


class DrippingHandler(http.server.BaseHTTPRequestHandler):
    """Answers with 20 bytes of JSON, one each 0.3 s."""

    def do_POST(self):
        self.send_response(200)
        self.send_header("Content-Length", "20")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for byte in b'"' + b"x" * 18 + b'"':
                self.wfile.write(bytes([byte]))
                time.sleep(0.3)

    def log_message(self, format, *args):
        pass


def measure_http() -> None:
    from train.rl.rewards import client

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), DrippingHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    calls = {"client.post_json": lambda: client.post_json(url, {}, secs=LIMIT_SECS, retries=0)}
    for name in ("requests", "httpx", "httpx2"):
        with contextlib.suppress(ImportError):
            post = importlib.import_module(name).post
            calls[name] = lambda post=post: post(url, json={}, timeout=LIMIT_SECS).json()
    print(f"an answer of a byte each 0.3 s, with a limit of {LIMIT_SECS} s:")
    for name, call in calls.items():
        started = time.perf_counter()
        try:
            outcome = f"got {call()!r}"
        except Exception as error:
            outcome = type(error).__name__
        print(f"  {name}: {outcome} after {time.perf_counter() - started:.1f} s")
    server.shutdown()


# --- partition ---


def measure_partition() -> None:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from m1_jax import config as config_lib
    from m1_jax import params
    from train import lora, trainable

    config = config_lib.ModelConfig.tiny()
    model = params.random_model(config, jax.random.key(0), jnp.dtype("float32"))
    model = lora.add_adapters(model, lora.LoraConfig(rank=4), jax.random.key(1))

    def is_trained(path, param) -> bool:
        return isinstance(param, nnx.Param) and not param.get_metadata()["frozen"]

    def sum_squares(model) -> jax.Array:
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(model))

    def gradient_of_ours(model):
        trained, frozen = trainable.partition(model)
        return jax.grad(lambda part: sum_squares(trainable.combine(part, frozen)))(trained)

    def gradient_of_nnx(model):
        graph, trained, frozen = nnx.split(model, is_trained, ...)
        return jax.grad(lambda part: sum_squares(nnx.merge(graph, part, frozen)))(trained)

    sums = []
    for name, gradient in (("trainable", gradient_of_ours), ("nnx.split", gradient_of_nnx)):
        arrays = jax.tree.leaves(jax.jit(gradient)(model))
        print(f"  {name}: {len(arrays)} gradients")
        sums.append(sorted(float(jnp.sum(array)) for array in arrays))
    print(f"  the same gradients: {sums[0] == sums[1]}")


SECTIONS = {
    "attention": measure_attention,
    "safetensors": measure_safetensors,
    "workers": measure_workers,
    "http": measure_http,
    "partition": measure_partition,
}


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["read-part"]:
        read_part(arguments[1], pathlib.Path(arguments[2]))
        return
    for name in arguments or SECTIONS:
        print(f"{name}", flush=True)
        SECTIONS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
