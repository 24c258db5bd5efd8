"""Prefill of long prompts, chunk after chunk through the engine's own program, at constant memory.

    python benchmarks/long_prefill.py [--lengths=8192,65536,1048576] [--softmax_every=0]

A tiny model of lightning layers reads prompts of these lengths. The program's temporary memory and
the state must have one size at all lengths. At the shortest length, the state and the token that is
chosen after the prompt are compared with the model's own chunked forward. With softmax layers
(--softmax_every=2: every second layer) the pages grow with the prompt, and so does the time of each
chunk. The exit status is 1 where any of this does not hold.
"""

import argparse
import dataclasses
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from infer import config as config_lib
from infer import options as options_lib
from infer.execution import device, programs, slot_sampling
from infer.execution import host_batch as host_batch_lib
from infer.scheduling import plan as plan_lib
from m1_jax import config as model_config_lib
from m1_jax import model as model_lib
from m1_jax.serving import state as state_lib

CHUNK_TOKENS = 64
ROWS = 2048  # tokens of one call of the prefill program
KINDS = (model_config_lib.LIGHTNING, model_config_lib.SOFTMAX)


@dataclasses.dataclass(frozen=True)
class PrefillRequest:
    """The part of a request that the program reads. The options are greedy, with one token."""

    prompt: np.ndarray
    options: options_lib.Options = dataclasses.field(
        default_factory=lambda: options_lib.Options(temperature=0, max_tokens=1)
    )
    stop_ids: tuple[int, ...] = ()

    @property
    def progress(self):
        """Return the object with `next_forced`, which is in a request's progress."""
        return self

    def next_forced(self) -> None:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,65536,1048576")
    parser.add_argument("--softmax_every", type=int, default=0)
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    model = make_model(arguments.softmax_every)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, max(lengths))
    tokens = tokens.astype(np.int32)
    temporary, problems = set(), []
    for length in lengths:
        program, config, state, rows = build_program(model, length)
        sizes = program._compiled.memory_analysis()
        start = time.monotonic()
        chosen, state = prefill_prompt(program, config, model, state, rows, tokens[:length])
        secs = time.monotonic() - start
        temporary.add(sizes.temp_size_in_bytes)
        finite = all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(state))
        print(
            f"{length} tokens: {secs:.1f} s, {length / secs:.0f} tokens/s, temporary "
            f"{sizes.temp_size_in_bytes} bytes, "
            f"state {count_state_bytes(state, state_lib.LightningSlots)} bytes, "
            f"pages {count_state_bytes(state, state_lib.PagedKVCache)} bytes",
            flush=True,
        )
        if not finite or not np.isfinite(chosen.logp_raw):
            problems.append(f"{length} tokens: not finite")
        if length == min(lengths):
            problems += compare_with_forward(model, tokens[:length], chosen, state)
    if len(temporary) > 1 and not arguments.softmax_every:
        problems.append(f"temporary memory differs: {sorted(temporary)} bytes")
    print(*problems or ["constant memory, and the state of the chunked forward"], sep="\n")
    sys.exit(bool(problems))


def make_model(softmax_every: int) -> model_lib.MiniMaxM1:
    every = softmax_every or 3
    config = dataclasses.replace(
        model_config_lib.ModelConfig.tiny(),
        layer_types=tuple(KINDS[layer % every == every - 1] for layer in range(2)),
        max_position_embeddings=2**21,
        initializer_range=0.1,
    )
    return model_lib.MiniMaxM1(config, nnx.Rngs(0), dtype=jnp.float32)


def build_program(model, length: int):
    """Compile the prefill program of an engine for one sequence of this length."""
    config = config_lib.EngineConfig(
        max_length=length + CHUNK_TOKENS,
        max_rows=1,
        num_snapshots=0,
        chunk_tokens=CHUNK_TOKENS,
        prefill_tokens=(ROWS,),
    )
    state = state_lib.init_serving_state(
        model.config, config.total_slots, config.total_pages, CHUNK_TOKENS, model.dtype
    )
    rows = slot_sampling.init_sampling_state(config.total_slots, model.config.vocab_size)
    tiles = programs.EngineTiles.of_config(config.for_platform(jax.default_backend()))

    def run(model, state, rows, batch, prompts):
        return programs.prefill_prompts(model, state, rows, batch, prompts, tiles)

    batch = host_batch_lib.make_empty_batch(host_batch_lib.MAX_PREFILL_CHUNKS, config)
    prompts = host_batch_lib.make_empty_prompts(ROWS, config)
    return (
        device.CompiledProgram(run, (1, 2), model, state, rows, batch, prompts),
        config,
        state,
        rows,
    )


def prefill_prompt(program, config, model, state, rows, tokens):
    """Read the prompt, and return the token that is chosen after it, and the state."""
    request, chosen = PrefillRequest(tokens), None
    for start in range(0, len(tokens), ROWS):
        chunk = tokens[start : start + ROWS]
        end = start + len(chunk)
        pages = tuple(range(1, -(-end // CHUNK_TOKENS) + 1))
        part = plan_lib.PrefillChunk(0, 1, start, len(chunk), pages, end == len(tokens), False)
        prompts = host_batch_lib.pack_prompts([part], [(chunk, -1)], config)
        batch = host_batch_lib.make_batch(
            host_batch_lib.MAX_PREFILL_CHUNKS, [part], [request], config
        )
        state, rows, chosen = program(model, state, rows, batch, prompts)
    return host_batch_lib.fetch_tokens(chosen).row_tokens(0)[0], state


def count_state_bytes(state, kind) -> int:
    group_states = [part for part in state.group_states if isinstance(part, kind)]
    return sum(array.nbytes for array in jax.tree.leaves(group_states))


def compare_with_forward(model, tokens, chosen, state) -> list[str]:
    """Compare with the model's own forward of the whole prompt."""
    length = len(tokens)
    assert length % CHUNK_TOKENS == 0, "the state is on the grid"
    logits, forward_state = model.extend(
        jnp.asarray(tokens)[None], model.init_state(1, length), last_only=True
    )
    problems = []
    for slots, layer_state in zip(state.group_states, forward_state.group_states, strict=True):
        if isinstance(slots, state_lib.LightningSlots):
            # Slot 1 is the sequence's. Slot 0 holds padding.
            gap = float(jnp.max(jnp.abs(slots.states[:, :, 1] - layer_state[:, :, 0])))
            scale = float(jnp.max(jnp.abs(layer_state)))
            print(f"largest difference of states {gap:.2g}, of {scale:.2g} at most")
            if not gap <= 1e-5 * scale:
                problems.append("states differ")
    logp = jax.nn.log_softmax(logits[0, 0])
    gap = abs(float(jnp.max(logp)) - chosen.logp_raw)
    print(f"greedy token {chosen.id}, its log-probability differs by {gap:.2g}")
    if chosen.id != int(jnp.argmax(logp)) or not gap <= 1e-5:
        problems.append("the next token differs")
    return problems


if __name__ == "__main__":
    main()
