"""A generation batch on a host: its bytes, its packing, and what it takes to send it to all."""

import dataclasses
import json
import math
import pickle
import time
import tracemalloc
from typing import Any

import numpy as np

from m1_jax import config as model_config_lib
from train.rl import batch as rl_batch
from train.rl import config as rl_config
from train.rl import sample as sample_lib
from train.rl import sample_json

_SCALED_TOKENS = 40_000  # tokens that are measured, to extrapolate from
_SCALED_SAMPLES = 8
MEAN_ANSWERS = (4096, 8192, 16_384, 30_720, 61_440)
_GAMMA_SHAPE = 2.0  # of the lengths of answers


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The longest generation batch of a run.

    Attributes:
      num_samples: answers of a batch.
      prompt_tokens: tokens of the longest prompt.
      answer_tokens: tokens of the longest answer.
      rows, row_tokens: shape of a microbatch.
      minibatches: updates of a batch.
      expert_ids_shape: (layers, experts of a token) of replayed routes, or None.
    """

    num_samples: int
    prompt_tokens: int
    answer_tokens: int
    rows: int
    row_tokens: int
    minibatches: int
    expert_ids_shape: tuple[int, int] | None

    @classmethod
    def of_config(
        cls, config: rl_config.RlConfig, model: model_config_lib.ModelConfig, row_tokens: int
    ) -> "BatchSizes":
        """Return the sizes that a config says."""
        routes = (len(model.layer_types), model.num_experts_per_tok)
        return cls(
            num_samples=config.rollout.groups * config.rollout.group_size,
            prompt_tokens=config.rollout.max_prompt_tokens,
            answer_tokens=config.rollout.windows.tokens[-1],
            rows=config.update.rows,
            row_tokens=row_tokens,
            minibatches=config.update.minibatches,
            expert_ids_shape=routes if config.rollout.replay_routes else None,
        )

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all answers at their longest."""
        return self.num_samples * self.answer_tokens

    @property
    def scaled_tokens(self) -> int:
        """Return the tokens that are measured."""
        return min(_SCALED_TOKENS, self.num_tokens)


@dataclasses.dataclass(frozen=True)
class BatchCost:
    """What the longest generation batch costs, extrapolated from a part of it.

    Attributes:
      object_bytes: samples in a host's memory.
      row_bytes: all packed rows in a host's memory.
      sent_bytes: what process 0 sends to all others.
      encode_secs, decode_secs: seconds of process 0 to encode it, and of the others to decode it.
      pack_secs: seconds of every host to pack it.
      state_bytes_per_token: bytes of a carried token in a checkpoint.
      state_secs_per_token: seconds to write them.
    """

    object_bytes: float
    row_bytes: float
    sent_bytes: float
    encode_secs: float
    decode_secs: float
    pack_secs: float
    state_bytes_per_token: float
    state_secs_per_token: float


def make_sample(
    prompt_tokens: int, answer_tokens: int, expert_ids_shape: tuple[int, int] | None, seed: int = 0
) -> sample_lib.Sample:
    """Return a finished sample, as an episode of one turn makes it."""
    rng = np.random.default_rng(seed)
    task = sample_lib.Task(f"rehearsal/{seed}", ({"role": "user", "content": "?"},), "rehearsal")
    routes = None
    if expert_ids_shape is not None:
        num_routed = prompt_tokens + answer_tokens - 1
        routes = rng.integers(0, 32, (num_routed, *expert_ids_shape), np.int8)
    ids = rng.integers(300, 200_000, prompt_tokens + answer_tokens).tolist()
    logprobs = (-rng.random(answer_tokens)).tolist()
    sample = sample_lib.Sample(task, tuple(ids[:prompt_tokens]))
    sample.append_generated(
        sample_lib.Generation(
            tokens=tuple(ids[prompt_tokens:]),
            logprobs=tuple(logprobs),
            versions=(1,) * answer_tokens,
            status="stop",
            routes=routes,
        )
    )
    sample.reward = 1.0
    return sample


def measure_batch(sizes: BatchSizes) -> BatchCost:
    """Make, encode, decode and pack a part of a batch on one core, and extrapolate linearly."""
    answer = max(sizes.scaled_tokens // _SCALED_SAMPLES, 1)
    prompt = max(1, answer * sizes.prompt_tokens // sizes.answer_tokens)
    tracemalloc.start()
    samples = [
        make_sample(prompt, answer, sizes.expert_ids_shape, seed) for seed in range(_SCALED_SAMPLES)
    ]
    object_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    encode_secs, text = _time_call(lambda: pickle.dumps(samples))
    decode_secs, _ = _time_call(lambda: pickle.loads(text))
    row_tokens = answer + prompt
    # One row a sample, as in the longest batch.
    pack_secs, packed = _time_call(
        lambda: rl_batch.pack_samples(samples, 1, row_tokens, sizes.expert_ids_shape)
    )
    state_secs, states = _time_call(lambda: [_dump_state(sample) for sample in samples])
    factor = sizes.num_tokens / (answer * _SCALED_SAMPLES)
    return BatchCost(
        object_bytes=object_bytes * factor,
        row_bytes=_count_row_bytes(packed.microbatches)
        / (_SCALED_SAMPLES * row_tokens)
        * count_places(sizes),
        sent_bytes=len(text) * factor,
        encode_secs=encode_secs * factor,
        decode_secs=decode_secs * factor,
        pack_secs=pack_secs * factor,
        state_bytes_per_token=sum(map(len, states)) / (answer * _SCALED_SAMPLES),
        state_secs_per_token=state_secs / (answer * _SCALED_SAMPLES),
    )


def count_places(sizes: BatchSizes) -> int:
    """Return the places of all rows of the longest batch: whole microbatches of each update."""
    samples = math.ceil(sizes.num_samples / sizes.minibatches)
    samples_of_row = max(sizes.row_tokens // (sizes.prompt_tokens + sizes.answer_tokens), 1)
    rows = math.ceil(samples / samples_of_row)
    microbatches = math.ceil(rows / sizes.rows)
    return sizes.minibatches * microbatches * sizes.rows * sizes.row_tokens


def measure_utilisation(sizes: BatchSizes, config: rl_config.RlConfig) -> dict[int, float]:
    """Return the share of computed places that hold a token, by the mean length of answers.

    Lengths are gamma-distributed and cut at the window. All lengths are divided by one number
    before they are packed, which changes no share.
    """
    scale = max(sizes.row_tokens // 1024, 1)
    shares = {}
    for mean in MEAN_ANSWERS:
        if mean >= sizes.answer_tokens and len(shares) > 0:
            continue
        mean = min(mean, sizes.answer_tokens // 2)
        rng = np.random.default_rng(config.seed)
        lengths = rng.gamma(_GAMMA_SHAPE, mean / _GAMMA_SHAPE, sizes.num_samples)
        lengths = np.clip(lengths, 1, sizes.answer_tokens).astype(int)
        tokens = places = 0
        for part in np.array_split(lengths, sizes.minibatches):
            samples = [
                make_sample(max(1, sizes.prompt_tokens // 8 // scale), max(1, n // scale), None)
                for n in part
            ]
            packed = rl_batch.pack_samples(samples, sizes.rows, sizes.row_tokens // scale)
            tokens += sum(int((rows.segment_ids > 0).sum()) for rows in packed.microbatches)
            places += sum(rows.segment_ids.size for rows in packed.microbatches)
        shares[mean] = tokens / places
    return shares


def _count_row_bytes(microbatches: list[rl_batch.HostRows]) -> int:
    arrays = [
        getattr(rows, field.name) for rows in microbatches for field in dataclasses.fields(rows)
    ]
    return sum(array.nbytes for array in arrays if array is not None)


def _dump_state(sample: sample_lib.Sample) -> str:
    return json.dumps(sample_json.sample_to_json(sample))


def _time_call(function: Any) -> tuple[float, Any]:
    """Return the CPU seconds of a call, and its result."""
    started = time.process_time()
    result = function()
    return time.process_time() - started, result
