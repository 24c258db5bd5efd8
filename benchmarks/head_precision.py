"""How well sampler and trainer agree, with logits in float32 and rounded to bfloat16 (M1 3.2).

    python benchmarks/head_precision.py CHECKPOINT TASKS.jsonl [--groups=64] [--size=8]

A small analogue of M1's Figure 3. A model in bfloat16 samples answers through the engine, and the
trainer's forward pass computes the probabilities of the same tokens. Both are done twice: with the
head as it is, whose sums stay in float32, and with logits rounded to bfloat16 on both sides, as a
head in that dtype makes them. The rest of the model is the same. `benchmarks/cispo_vs_dapo.py`
leaves a checkpoint and tasks that fit in DIR/model-a-*: `tuned` and `tasks.jsonl`.
"""

import argparse
import itertools
import pathlib
import sys

# By path, the script's own directory comes first; the packages lie above it.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import jax.numpy as jnp
import numpy as np
import tqdm

from infer import prompt
from m1_jax import layers
from m1_jax import tokenizer as tokenizer_lib
from m1_jax.checkpoints import load as load_lib
from train.rl import batch as rl_batch
from train.rl import episodes, groups, mismatch, rollout, row_packing, tasks
from train.rl import step as rl_step

MAX_ANSWER_TOKENS = 64
ROWS = 16  # of the engine's batch, and of the trainer's
MEASURES = ("pearson", "probability_gap_mean", "logp_gap_mean", "logp_gap_max", "k3")


class RoundedHead(layers.Head):
    """A head whose logits are those of a head in bfloat16."""

    def __call__(self, x):
        return super().__call__(x).astype(jnp.bfloat16).astype(jnp.float32)


def load_model(directory: str, rounded: bool):
    """Return the model in bfloat16, with rounded logits if `rounded`."""
    model = load_lib.load(directory, jnp.bfloat16)
    if rounded:
        model.head.__class__ = RoundedHead
    return model


def sample_answers(model, tokenizer, all_tasks, size: int) -> list:
    """Draw `size` answers to each task."""
    longest = (
        max(len(prompt.encode_prompt(tokenizer, task.messages)) for task in all_tasks)
        + MAX_ANSWER_TOKENS
    )
    jobs = [
        rollout.EpisodeJob(
            (i, n),
            episodes.single_turn_episode(task, tokenizer, MAX_ANSWER_TOKENS),
            groups.sample_seed(0, i, n),
        )
        for (i, task), n in itertools.product(enumerate(all_tasks), range(size))
    ]
    samples = {}

    def on_done(key, sample):
        samples[key] = sample
        bar.update()
        return ()

    sizes = {"max_rows": ROWS, "chunk_tokens": 16, "prefill_tokens": (64, 256)}
    config = rollout.make_engine_config(sizes, longest, len(jobs))
    sampler = rollout.RolloutSampler(model, tokenizer, config, rollout.RolloutSampling())
    with tqdm.tqdm(total=len(jobs), unit="answer") as bar:
        try:
            sampler.run(lambda: jobs, on_done)
        finally:
            sampler.close()
    return [samples[key] for key in sorted(samples)]


def measure_agreement(model, samples) -> tuple[int, dict[str, float]]:
    """Return the number of tokens, and `measure_mismatch` of the trainer's probabilities."""
    length = max(len(sample.prompt) + len(sample.tokens) for sample in samples)
    packed = rl_batch.pack_samples(samples, row_packing.make_row_shapes(ROWS, length, None))
    logp_old = {}
    for i in range(packed.num_microbatches):
        rows = rl_batch.device_put_rows(packed.make_rows(i))
        logp_old |= packed.extract(i, np.asarray(rl_step.score_logprobs(model, rows, 1.0)[0]))
    # These answers have no tool's tokens, so the model wrote all of them.
    return sum(len(sample.tokens) for sample in samples), mismatch.measure_mismatch(
        (sample.logprobs, logp_old[i]) for i, sample in enumerate(samples)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("tasks")
    parser.add_argument("--groups", type=int, default=64, help="tasks that are answered")
    parser.add_argument("--size", type=int, default=8, help="answers to each")
    arguments = parser.parse_args()
    tokenizer = tokenizer_lib.Tokenizer.load(arguments.checkpoint)
    source = tasks.FileTasks(tasks.TaskSource("tasks", arguments.tasks))
    if not (1 <= arguments.groups <= len(source) and arguments.size >= 1):
        parser.error(
            f"got --groups={arguments.groups} --size={arguments.size}; wanted 1 to {len(source)} "
            "groups, as many as there are tasks, and a size of at least 1"
        )
    all_tasks = [source[i] for i in range(arguments.groups)]
    print("| logits | tokens |", *(f"{name} |" for name in MEASURES))
    print("|---" * (2 + len(MEASURES)) + "|")
    for name, rounded in (("float32", False), ("bfloat16", True)):
        model = load_model(arguments.checkpoint, rounded)
        tokens, measures = measure_agreement(
            model, sample_answers(model, tokenizer, all_tasks, arguments.size)
        )
        print(f"| {name} | {tokens} |", *(f"{measures[key]:.6g} |" for key in MEASURES), flush=True)


if __name__ == "__main__":
    main()
