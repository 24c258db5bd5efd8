"""A generation batch on a host: its bytes, its rows, and what it takes to send it to all."""

import dataclasses
import pickle
import time
from typing import Any

import numpy as np

from m1_jax import config as model_config_lib
from m1_jax import sharding
from train.rl import batch as rl_batch
from train.rl import config as rl_config
from train.rl import group_columns, row_packing, sample_groups
from train.rl import sample as sample_lib

_SCALED_TOKENS = 320_000  # tokens that are measured, to extrapolate from
_SCALED_SAMPLES = 8
MEAN_ANSWERS = (4096, 8192, 16_384, 30_720, 61_440)
_GAMMA_SHAPE = 4.0  # of the lengths of answers: their standard deviation is half of their mean


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The longest generation batch of a run.

    Attributes:
      num_samples: answers of a batch.
      prompt_tokens: tokens of the longest prompt.
      answer_tokens: tokens of the longest answer.
      shapes: shapes that microbatches may have.
      minibatches: updates of a batch.
      expert_ids_shape: (layers, experts of a token) of replayed routes, or None.
      window: rows and columns of the largest microbatch that a device has.
      host_share: part of a microbatch's places that process 0 makes for its devices.
    """

    num_samples: int
    prompt_tokens: int
    answer_tokens: int
    shapes: row_packing.RowShapes
    minibatches: int
    expert_ids_shape: tuple[int, int] | None
    window: row_packing.MicrobatchShape
    host_share: float

    @classmethod
    def of_config(
        cls,
        config: rl_config.RlConfig,
        model: model_config_lib.ModelConfig,
        shapes: row_packing.RowShapes,
        layout: sharding.MeshLayout | None,
    ) -> "BatchSizes":
        """Return the sizes that a config says."""
        routes = (len(model.layer_types), model.num_experts_per_tok)
        window, host_share = _find_windows(layout, shapes.largest)
        return cls(
            num_samples=config.rollout.groups * config.rollout.group_size,
            prompt_tokens=config.rollout.max_prompt_tokens,
            answer_tokens=config.rollout.windows.tokens[-1],
            shapes=shapes,
            minibatches=config.update.minibatches,
            expert_ids_shape=routes if config.rollout.replay_routes else None,
            window=window,
            host_share=host_share,
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
      sample_bytes: columns of the samples in a host's memory, which process 0 sends to all others.
      table_bytes: what goes over the hosts' network beside the columns.
      row_bytes: a host's part of the largest microbatch's rows in its memory.
      encode_secs, decode_secs: seconds of process 0 to make columns, and of the others to read
        them.
      row_secs: seconds of a host to make its parts of all rows, once to score and once to update.
      carried_bytes_per_token: bytes of an unfinished answer's token in a checkpoint.
    """

    sample_bytes: float
    table_bytes: float
    row_bytes: float
    encode_secs: float
    decode_secs: float
    row_secs: float
    carried_bytes_per_token: float


def make_sample(
    prompt_tokens: int, answer_tokens: int, expert_ids_shape: tuple[int, int] | None, seed: int = 0
) -> sample_lib.Sample:
    """Return a finished sample, as an episode of one turn makes it."""
    rng = np.random.default_rng(seed)
    task = sample_lib.Task(f"rehearsal/{seed}", ({"role": "user", "content": "?"},), "rehearsal")
    sample = sample_lib.Sample(task, rng.integers(300, 200_000, prompt_tokens))
    sample.append_generated(_make_generation(rng, prompt_tokens, answer_tokens, expert_ids_shape))
    sample.reward = 1.0
    return sample


def _make_generation(
    rng: np.random.Generator,
    prompt_tokens: int,
    answer_tokens: int,
    expert_ids_shape: tuple[int, int] | None,
) -> sample_lib.Generation:
    routes = None
    if expert_ids_shape is not None:
        num_routed = prompt_tokens + answer_tokens - 1
        routes = rng.integers(0, 32, (num_routed, *expert_ids_shape), np.int8)
    return sample_lib.Generation(
        tokens=rng.integers(300, 200_000, answer_tokens),
        logprobs=-rng.random(answer_tokens),
        versions=np.ones(answer_tokens, np.int32),
        status="stop",
        routes=routes,
        raw=-rng.random(answer_tokens),
    )


def measure_batch(sizes: BatchSizes) -> BatchCost:
    """Encode, decode and lay out a part of a batch on one core, and extrapolate linearly."""
    answer = max(sizes.scaled_tokens // _SCALED_SAMPLES, 1)
    prompt = max(1, answer * sizes.prompt_tokens // sizes.answer_tokens)
    samples = [
        make_sample(prompt, answer, sizes.expert_ids_shape, seed) for seed in range(_SCALED_SAMPLES)
    ]
    groups = [_make_group(samples)]
    batch = sample_groups.GenerationBatch(groups, {}, 0.0)
    encode_secs, (table, columns) = _time_call(lambda: group_columns.batch_to_columns(batch))
    decode_secs, _ = _time_call(lambda: group_columns.batch_from_columns(table, columns))
    # One row a sample, as in the longest batch.
    shapes = row_packing.make_row_shapes(_SCALED_SAMPLES, prompt + answer, None)
    packed = rl_batch.pack_samples(samples, shapes, sizes.expert_ids_shape)
    # The middle of a long row, as most devices have it.
    row_tokens = packed.plan.shapes[0].row_tokens
    width = min(
        max(row_tokens * sizes.window.row_tokens // sizes.shapes.row_lengths[-1], 1), row_tokens
    )
    first = (row_tokens - width) // 2
    window = rl_batch.RowWindow(0, 1, first, first + width)
    row_secs, rows = _time_call(lambda: packed.make_rows(0, window))
    secs_per_place = row_secs / window.shape.num_places
    factor = sizes.num_tokens / (answer * _SCALED_SAMPLES)
    return BatchCost(
        sample_bytes=sum(column.nbytes for column in columns.values()) * factor,
        table_bytes=len(pickle.dumps(table)) * sizes.num_samples / _SCALED_SAMPLES,
        row_bytes=_count_row_bytes(rows)
        / rows.tokens.size
        * sizes.shapes.largest.num_places
        * sizes.host_share,
        encode_secs=encode_secs * factor,
        decode_secs=decode_secs * factor,
        row_secs=2 * secs_per_place * sizes.num_tokens * sizes.host_share,
        carried_bytes_per_token=_count_carried_bytes(answer),
    )


def _find_windows(
    layout: sharding.MeshLayout | None, shape: row_packing.MicrobatchShape
) -> tuple[row_packing.MicrobatchShape, float]:
    """Return the shape of a device's part of a microbatch, and which share of it process 0 has."""
    if layout is None:
        return shape, 1.0
    placed = layout.activation_sharding("batch", "length")
    window = row_packing.MicrobatchShape(*placed.shard_shape(tuple(shape)))
    windows = placed.devices_indices_map(tuple(shape))
    # By their text: slices have no hash. Several devices may have the same part.
    held = {str(index) for device, index in windows.items() if device.process_index == 0}
    return window, len(held) * window.num_places / shape.num_places


def _make_group(samples: list[sample_lib.Sample]) -> sample_groups.SampleGroup:
    return sample_groups.SampleGroup(
        0, "rehearsal", 0, 1, samples[0].task, list(samples), [None] * len(samples), []
    )


def _count_carried_bytes(answer_tokens: int) -> float:
    """Return the bytes of a token of an unfinished answer, as a checkpoint has it."""
    generation = _make_generation(np.random.default_rng(0), 0, answer_tokens, None)
    group = _make_group([make_sample(1, 1, None)])
    group.samples, group.partial = [None], [generation]
    _, columns = group_columns.groups_to_columns([group], "open", with_text=True)
    return sum(column.nbytes for column in columns.values()) / answer_tokens


def measure_utilisation(sizes: BatchSizes, seed: int) -> dict[int, tuple[float, float]]:
    """Return the shares of computed places that hold a token, by the mean length of answers.

    The first is that of scoring, which packs the whole batch, and the second that of updates.
    Lengths are gamma-distributed and cut at the window.
    """
    shares = {}
    for mean in MEAN_ANSWERS:
        if mean >= sizes.answer_tokens and shares:
            continue
        mean = min(mean, max(sizes.answer_tokens // 2, 1))
        rng = np.random.default_rng(seed)
        lengths = rng.gamma(_GAMMA_SHAPE, mean / _GAMMA_SHAPE, sizes.num_samples)
        lengths = np.clip(lengths, 1, sizes.answer_tokens).astype(int)
        lengths += max(1, sizes.prompt_tokens // 8)
        parts = np.array_split(lengths, sizes.minibatches)
        shares[mean] = (
            _measure_share([lengths], sizes.shapes),
            _measure_share(parts, sizes.shapes),
        )
    return shares


def _measure_share(parts: list[np.ndarray], shapes: row_packing.RowShapes) -> float:
    plans = [row_packing.plan_rows([int(n) for n in part], shapes) for part in parts]
    return float(sum(map(np.sum, parts)) / sum(plan.num_places for plan in plans))


def _count_row_bytes(rows: rl_batch.HostRows) -> int:
    arrays = [getattr(rows, field.name) for field in dataclasses.fields(rows)]
    return sum(array.nbytes for array in arrays if array is not None)


def _time_call(function: Any) -> tuple[float, Any]:
    """Return the CPU seconds of a call, and its result."""
    started = time.process_time()
    result = function()
    return time.process_time() - started, result
