"""What a generation batch costs the host while all chips wait, at true size and without a model.

    python benchmarks/rl_host_cost.py                       # 512 answers, mean of up to 80K tokens
    python benchmarks/rl_host_cost.py --routes --answers 128
    python benchmarks/rl_host_cost.py --padding             # lengths alone

The batch is that of configs/cispo_m1.py. Everything outside of sampling is done as the trainer does
it: samples out of the engine's columns, metrics of the batch, rows for scoring, scores back,
mismatch, advantages, rows for the updates, the state of a save, and the columns for other
processes. In place of the model, scores are the sampler's own log-probabilities. What a device
transfer takes is not measured.
"""

import argparse
import importlib.util
import json
import pathlib
import resource
import sys
import time

# By path, the script's own directory comes first; the packages lie above it.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from infer import output_tokens
from train.rl import advantages, batch_metrics, group_columns, groups, loss, row_packing
from train.rl import batch as rl_batch
from train.rl import config as rl_config
from train.rl import sample as sample_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
MEANS = (4096, 8192, 16_384, 30_000, 60_000)
PROMPT_TOKENS = 200
NUM_LAYERS, NUM_CHOSEN = 80, 2
# What the mesh expert=16, context=32 of cispo_m1 splits: rows, and tokens of a row.
BATCH_SPLIT, LENGTH_SPLIT = 16, 32
HOST_WINDOWS = 4  # of so many chips a host has the windows of the rows


class HostLayout:
    """What of a mesh's layout decides on rows, without its devices."""

    def axis_size(self, name: str) -> int:
        """Return how many parts a logical axis is split into."""
        return {"batch": BATCH_SPLIT, "length": LENGTH_SPLIT}[name]


def make_host_rows(packed: rl_batch.PackedSamples, microbatch: int) -> None:
    """Make the windows of a microbatch that a host in the middle of the mesh has."""
    shape = packed.plan.shapes[microbatch]
    height, width = shape.num_rows // BATCH_SPLIT, shape.row_tokens // LENGTH_SPLIT
    row = shape.num_rows // 2
    for i in range(HOST_WINDOWS):
        first = (LENGTH_SPLIT // 2 + i) * width
        packed.make_rows(microbatch, rl_batch.RowWindow(row, row + height, first, first + width))


class Clock:
    """Seconds by name."""

    def __init__(self):
        self.secs: dict[str, float] = {}
        self._began = time.process_time()

    def lap(self, name: str) -> None:
        """Note the CPU seconds since the lap before."""
        now = time.process_time()
        self.secs[name] = self.secs.get(name, 0.0) + now - self._began
        self._began = now

    def skip(self) -> None:
        """Leave out what was done since the lap before."""
        self._began = time.process_time()


def load_config() -> rl_config.RlConfig:
    """Return the config of the M1 run."""
    spec = importlib.util.spec_from_file_location("cispo_m1", ROOT / "configs/cispo_m1.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def make_shapes(config: rl_config.RlConfig) -> row_packing.RowShapes:
    """Return the shapes of the run's microbatches."""
    layout: object = HostLayout()
    longest = config.update.row_tokens or config.rollout.max_sample_tokens
    return row_packing.make_row_shapes(config.update.rows, longest, layout)  # type: ignore[arg-type]


def draw_lengths(
    rng: np.random.Generator, shape: float, mean: float, num: int, longest: int
) -> np.ndarray:
    """Return gamma-distributed lengths of answers, cut off by the window."""
    lengths = rng.gamma(shape, mean / shape, num).astype(int) + 1
    return np.minimum(lengths, longest)


def measure_padding(config: rl_config.RlConfig, shape: float, batches: int) -> None:
    """Print which share of the computed places holds a token, by mean length."""
    shapes, num = make_shapes(config), config.rollout.groups * config.rollout.group_size
    size = num // config.update.minibatches
    print(f"gamma of shape {shape:g}, {batches} batches of {num} answers, {size} a minibatch")
    print("| mean answer | scoring | update | programs | secs a batch |\n|---|---|---|---|---|")
    for mean in MEANS:
        rng, tokens, places = np.random.default_rng(0), 0, np.zeros(2)
        used: list[set] = [set(), set()]
        clock = Clock()
        for _ in range(batches):
            drawn = draw_lengths(rng, shape, mean, num, config.rollout.windows.tokens[-1])
            lengths = (drawn + PROMPT_TOKENS).tolist()
            parts = [lengths[first : first + size] for first in range(0, num, size)]
            plans = [
                [row_packing.plan_rows(lengths, shapes)],
                [row_packing.plan_rows(part, shapes) for part in parts],
            ]
            tokens += sum(lengths)
            for i, kind in enumerate(plans):
                places[i] += sum(plan.num_places for plan in kind)
                used[i] |= {shape for plan in kind for shape in plan.shapes}
        clock.lap("secs")
        scoring, update = tokens / places
        print(
            f"| {mean} | {scoring:.1%} | {update:.1%} | {len(used[0])} scoring, {len(used[1])} "
            f"update | {clock.secs['secs'] / batches:.3f} |"
        )


def make_groups(
    config: rl_config.RlConfig, args: argparse.Namespace, clock: Clock
) -> list[groups.SampleGroup]:
    """Return groups of samples as the sampler makes them of the engine's columns."""
    rng, size = np.random.default_rng(0), config.rollout.group_size
    lengths = draw_lengths(
        rng, args.shape, args.mean, args.answers, config.rollout.windows.tokens[-1]
    )
    batch = []
    for number in range(args.answers // size):
        task = sample_lib.Task(f"s/{number}", (), "s")
        prompt = rng.integers(0, 200_000, PROMPT_TOKENS)
        samples = []
        for i in range(size):
            length = int(lengths[number * size + i])
            logps = -rng.random(length, np.float32)
            columns = rng.integers(0, 200_000, length, np.int32), logps, logps, np.zeros(length)
            tokens = output_tokens.OutputTokens.from_columns(*columns)
            routes = None
            if args.routes:
                shape = (PROMPT_TOKENS + length - 1, NUM_LAYERS, NUM_CHOSEN)
                routes = np.full(shape, i, np.int8)
            clock.skip()
            sample = sample_lib.Sample(task, prompt)
            sample.append_generated(
                sample_lib.Generation(
                    tokens.ids.copy(), tokens.logps.copy(), tokens.versions.copy(), "stop",
                    routes, text="",
                )
            )  # fmt: skip
            sample.reward = float(rng.random() < 0.5)
            samples.append(sample)
            clock.lap("samples of the engine's columns")
        rewards = [sample.reward for sample in samples]
        batch.append(
            groups.SampleGroup(number, "s", number, 1, task, samples, [None] * size, rewards)
        )
    clock.skip()
    return batch


def measure_batch(config: rl_config.RlConfig, args: argparse.Namespace) -> None:
    """Print what one batch costs the host."""
    clock = Clock()
    batch = make_groups(config, args, clock)
    samples = [s for group in batch for s in groups.finished_samples(group)]
    group_ids = [group.group_id for group in batch for _ in group.samples]
    shapes = make_shapes(config)
    expert_ids_shape = (NUM_LAYERS, NUM_CHOSEN) if args.routes else None
    clock.skip()
    batch_metrics.measure_samples(samples, group_ids)
    versions = {group.oldest_version for group in batch}
    clock.lap("metrics of the batch")
    packed = rl_batch.pack_samples(samples, shapes, expert_ids_shape)
    clock.lap("packing for scoring")
    without_routes = rl_batch.pack_samples(samples, shapes)
    logp_old: dict[int, np.ndarray] = {}
    for i in range(packed.num_microbatches):
        clock.skip()
        make_host_rows(packed, i)
        clock.lap("a host's rows for scoring")
        row_scores = without_routes.make_rows(i).logp_rollout
        clock.skip()
        for number, part in packed.extract(i, row_scores).items():
            logp_old[number] = np.where(samples[number].mask > 0, part, 0)
        clock.lap("scores back")
    scores = [logp_old[i] for i in range(len(samples))]
    batch_metrics.measure_batch_mismatch(samples, scores, 0)
    clock.lap("mismatch")
    rewards = [sample.reward for sample in samples]
    values = advantages.sample_advantages(
        config.objective, rewards, group_ids, [True] * len(samples)
    )
    clock.lap("advantages")
    num_minibatches = max(config.update.minibatches * args.answers // 512, 1)
    for part in np.array_split(np.arange(len(samples)), num_minibatches):
        minibatch = [samples[i] for i in part]
        packed = rl_batch.pack_samples(minibatch, shapes, expert_ids_shape)
        counts = np.array([sample.num_generated for sample in minibatch])
        ids = np.array([group_ids[i] for i in part])
        coefficients = loss.token_coefficients(
            config.objective, counts, ids, np.ones(len(part), bool)
        )
        packed.fill("coefficients", coefficients.tolist())
        packed.fill("logp_old", [scores[i] for i in part])
        packed.fill("advantages", values[part].tolist())
        for i in range(packed.num_microbatches):
            make_host_rows(packed, i)
    clock.lap("packing, and a host's rows for the updates")
    tokens = sum(sample.num_tokens for sample in samples)
    per_token = sum(
        getattr(s, name).nbytes for s in samples for name in ("tokens", "mask", "logprobs")
    )
    per_token += sum(s.prompt.nbytes + s.versions.nbytes for s in samples)
    per_token += sum(x.nbytes for x in scores)
    print(f"{len(samples)} answers, {tokens / 1e6:.2f}M tokens, routes: {args.routes}")
    print(f"a sample and its scores: {per_token / tokens:.1f} bytes a token", end="")
    route_bytes = sum(s.routes.nbytes for s in samples if s.routes is not None)
    print(f", routes {route_bytes / tokens:.0f} more; oldest versions {versions}")
    print_laps(clock, tokens, "on one core outside of sampling")
    measure_columns(batch, tokens)


def measure_columns(batch: list[groups.SampleGroup], tokens: int) -> None:
    """Print what the state of a save, and the columns for other processes, cost."""
    clock = Clock()
    sent = groups.GenerationBatch(batch, {}, 0.5)
    table, columns = group_columns.batch_to_columns(sent)
    clock.lap("columns of the batch, on process 0")
    group_columns.batch_from_columns(table, columns)
    clock.lap("the batch of its columns, elsewhere")
    num_bytes = sum(x.nbytes for x in columns.values())
    print(f"sent: {num_bytes / tokens:.1f} bytes a token and {len(json.dumps(table))} of a table")
    del columns
    clock.skip()
    table, columns = group_columns.groups_to_columns(batch, "ready", with_text=False)
    clock.lap("state of a save that carries all of these groups")
    num_bytes = sum(x.nbytes for x in columns.values())
    print(f"saved: {num_bytes / tokens:.1f} bytes a token in {len(columns)} arrays")
    print_laps(clock, tokens, "in all")


def print_laps(clock: Clock, tokens: int, title: str) -> None:
    """Print seconds by step, and the most memory so far."""
    print("| step | CPU seconds | seconds per 1M tokens |\n|---|---|---|")
    for name, secs in (*clock.secs.items(), (title, sum(clock.secs.values()))):
        print(f"| {name} | {secs:.2f} | {secs / tokens * 1e6:.3f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process so far: {peak:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--answers", type=int, default=512, help="answers, a multiple of 16")
    parser.add_argument("--mean", type=float, default=81_920, help="mean length before the cut")
    parser.add_argument("--shape", type=float, default=4.0, help="shape of the gamma distribution")
    parser.add_argument("--routes", action="store_true", help="with routes of 80 layers, 2 each")
    parser.add_argument("--padding", action="store_true", help="measure padding alone")
    parser.add_argument("--batches", type=int, default=8, help="batches of --padding")
    args = parser.parse_args()
    config = load_config()
    if args.answers < 16 or args.answers % config.rollout.group_size:
        parser.error(
            f"--answers: got {args.answers}; wanted a multiple of {config.rollout.group_size}"
        )
    if args.padding:
        measure_padding(config, args.shape, args.batches)
    else:
        measure_batch(config, args)


if __name__ == "__main__":
    main()
