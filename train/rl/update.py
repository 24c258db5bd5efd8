"""One generation batch through the trainer: its own probabilities, advantages, updates, metrics."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from m1_jax import config as model_config_lib
from m1_jax import sharding
from train import optim
from train import step as step_lib
from train.rl import advantages, groups, objective, rollout_correction
from train.rl import batch as rl_batch
from train.rl import config as rl_config
from train.rl import metrics as rl_metrics
from train.rl import step as rl_step


class PolicyUpdater:
    """Trains on groups.

    Args:
      config: of the run. layout: of the trainer. reference: the model of the KL term, or None.
      optimizer: of the steps.

    Attributes:
      state: after the last call; the one given to it is gone.
    """

    state: step_lib.TrainState

    def __init__(
        self,
        config: rl_config.RlConfig,
        model_config: model_config_lib.ModelConfig,
        layout: sharding.MeshLayout | None,
        optimizer: optim.AdamW,
        reference: Any = None,
    ):
        self._config, self._layout, self._reference = config, layout, reference
        self._expert_ids_shape = None
        if config.rollout.replay_routes:
            self._expert_ids_shape = (
                len(model_config.layer_types),
                model_config.num_experts_per_tok,
            )
        self._settings = rl_step.RlStepSettings(
            optimizer, config.objective, config.rollout.temperature, config.update.balance
        )

    def __call__(
        self,
        state: step_lib.TrainState,
        batch: Sequence[groups.SampleGroup],
        batch_number: int,
        weight_version: int,
    ) -> dict[str, Any]:
        """Make the updates of batch `number`; return its metrics.

        version: of the weights before them.

        Raises:
          FloatingPointError: no update had a finite gradient.
        """
        self.state, began = state, time.perf_counter()
        samples = [sample for group in batch for sample in groups.finished_samples(group)]
        numbers = [group.group_id for group in batch for _ in group.samples]
        found = self._group_metrics(samples, numbers)
        parts = [
            self._pack_minibatch(part) for part in self._split_minibatches(batch, batch_number)
        ]
        parts = [part for part in parts if part.microbatches]
        if not parts:
            return found | {"updates": 0.0, "training_secs": time.perf_counter() - began}
        entropy = self._fill_logprobs(parts)
        scored = time.perf_counter()
        found |= _mismatch_metrics(parts, weight_version) | {"entropy_old": entropy}
        self._fill_advantages(parts, samples, numbers)
        updates = []
        for _ in range(self._config.update.epochs):
            updates += [self._update_minibatch(part) for part in parts]
        found |= _merge_update_metrics(updates)
        if found["skipped"] == found["updates"]:
            raise FloatingPointError(
                f"batch {batch_number}: none of {len(updates)} updates had a finite "
                "gradient; lower the "
                "learning rate, or go on from an earlier checkpoint"
            )
        found["scoring_forward_secs"] = scored - began
        found["training_secs"] = time.perf_counter() - began
        return found

    # ---- before the updates

    def _split_minibatches(
        self, batch: Sequence[groups.SampleGroup], number: int
    ) -> list[list[groups.SampleGroup]]:
        """Return the minibatches, each of whole groups, in an order drawn for this batch."""
        order = np.random.default_rng((self._config.seed, number)).permutation(len(batch))
        return [
            [batch[i] for i in part]
            for part in np.array_split(order, self._config.update.minibatches)
        ]

    def _pack_minibatch(self, part: Sequence[groups.SampleGroup]) -> rl_batch.PackedSamples:
        rollout = self._config.rollout
        pairs = [(group.group_id, one) for group in part for one in groups.finished_samples(group)]
        kept = [(number, one) for number, one in pairs if one.valid]
        packed = rl_batch.pack_samples(
            [one for _, one in kept],
            self._config.update.rows,
            self._config.update.row_tokens or rollout.max_sample_tokens,
            self._expert_ids_shape,
        )
        lengths = np.array([sum(one.mask) for _, one in kept])
        prompts = np.array([number for number, _ in kept])
        each = objective.token_coefficients(
            self._config.objective, lengths, prompts, np.ones(len(kept), bool)
        )
        packed.fill("coefficients", list(each))
        return packed

    def _fill_logprobs(self, parts: list[rl_batch.PackedSamples]) -> float:
        """Write the trainer's probabilities of everything; return the mean entropy."""
        made, temperature = [], self._settings.temperature
        for rows in (rows for part in parts for rows in part.microbatches):
            placed = rl_batch.device_put_rows(rows, self._layout)
            logp, entropy = rl_step.score_logprobs(self.state.model, placed, temperature)
            ref = None
            if self._reference is not None:
                ref, _ = rl_step.score_logprobs(self._reference, placed, temperature)
            made.append((rows, logp, entropy, ref))
        # Fetched when all are on their way, so that the device never waits for the host.
        total, tokens = 0.0, 0.0
        for rows, logp, entropy, ref in made:
            real = rows.mask > 0
            rows.logp_old[:] = np.where(real, rl_batch.gather_to_host(logp), 0)
            if ref is not None:
                rows.logp_ref[:] = np.where(real, rl_batch.gather_to_host(ref), 0)
            total += float(np.sum(np.where(real, rl_batch.gather_to_host(entropy), 0)))
            tokens += float(np.sum(real))
        return total / max(tokens, 1.0)

    def _fill_advantages(self, parts, samples, numbers) -> None:
        chosen = self._config.objective
        rewards = [0.0 if one.reward is None else one.reward for one in samples]
        valid = [one.valid for one in samples]
        turns = [one.turn_rewards for one in samples]
        if chosen.advantage.startswith("return") or any(turns):
            kls = None
            if chosen.reward_kl_coef:
                kls = [np.zeros(len(one.tokens)) for one in samples]
                place = {id(one): i for i, one in enumerate(samples)}
                for part in parts:
                    gaps = part.extract(
                        [rows.logp_old - rows.logp_ref for rows in part.microbatches]
                    )
                    for one, gap in zip(part.samples, gaps, strict=True):
                        kls[place[id(one)]] = gap
            masks = [np.asarray(one.mask) for one in samples]
            made = advantages.token_advantages(chosen, rewards, numbers, valid, masks, turns, kls)
        else:
            made = list(advantages.sample_advantages(chosen, rewards, numbers, valid))
        of = {id(one): value for one, value in zip(samples, made, strict=True)}
        for part in parts:
            part.fill("advantages", [of[id(one)] for one in part.samples])

    # ---- an update

    def _update_minibatch(self, part: rl_batch.PackedSamples) -> tuple[Any, Any]:
        """Make one step; return its metrics, still on the device."""
        weight_mean, sums = self._weight_mean(part), None
        tokens = [float(np.sum(rows.segment_ids > 0)) for rows in part.microbatches]
        for rows, number in zip(part.microbatches, tokens, strict=True):
            placed = rl_batch.device_put_rows(rows, self._layout)
            share = np.float32(number / sum(tokens))
            sums = rl_step.accumulate_gradients(
                sums, self.state.model, placed, share, weight_mean, self._settings
            )
        assert sums is not None
        self.state, metrics = rl_step.apply_update(self.state, sums[0], self._settings)
        return sums[1], metrics

    def _weight_mean(self, part: rl_batch.PackedSamples):
        chosen = self._config.objective.correction
        if chosen is None or not chosen.normalise:
            return None
        totals = np.zeros(2)
        for rows in part.microbatches:
            weight, _ = rollout_correction.correction_weights(
                chosen, rows.logp_old, rows.logp_rollout, rows.mask, rows.segment_ids
            )
            totals += np.asarray(rollout_correction.weight_sum_and_count(weight, rows.mask))
        return np.float32(totals[0] / max(totals[1], 1.0))

    def _group_metrics(self, samples, numbers) -> dict[str, float]:
        rewards = [math.nan if one.reward is None else one.reward for one in samples]
        lengths = [sum(one.mask) for one in samples]
        found = rl_metrics.summarize_groups(
            rewards,
            numbers,
            [one.valid for one in samples],
            lengths,
            [one.status for one in samples],
        )
        said = [
            logp for one in samples for logp, m in zip(one.logprobs, one.mask, strict=True) if m
        ]
        found["nll"] = -float(np.mean(said)) if said else 0.0
        names = sorted({name for one in samples for name in one.parts})
        for name in names:
            values = [one.parts[name] for one in samples if name in one.parts]
            found[f"reward/{name}"] = float(np.mean(values))
        return found


def _mismatch_metrics(parts: list[rl_batch.PackedSamples], version: int) -> dict[str, float]:
    """Compare sampler and trainer on what the present weights wrote."""
    columns: list[list[np.ndarray]] = [[], [], []]
    for part in parts:
        old = part.extract([rows.logp_old for rows in part.microbatches])
        for one, trainer in zip(part.samples, old, strict=True):
            same = (np.asarray(one.mask) > 0) & (np.asarray(one.versions) == version)
            number = np.full(int(same.sum()), len(columns[2]))
            for column, value in zip(
                columns, (np.asarray(one.logprobs)[same], trainer[same], number), strict=True
            ):
                column.append(value)
    rollout, old, ids = (np.concatenate(column)[None] for column in columns)
    if not rollout.size:
        return {}
    return rl_metrics.measure_mismatch(rollout, old, np.ones(rollout.shape), ids)


def _merge_update_metrics(updates: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return the metrics of all updates of a batch together: means, and extremes of extremes."""
    reports = [rl_metrics.summarize_metrics(jax.device_get(measured)) for measured, _ in updates]
    found: dict[str, Any] = {}
    for name in reports[0]:
        how: Callable = {"ratio_min": min, "ratio_max": max, "ratio_p99": max}.get(name, np.mean)
        found[name] = float(how([one[name] for one in reports]))
    counts = {
        name: np.sum([measured["drops"][name] for measured, _ in updates], axis=0)
        for name in ("by_token", "clipped")
    }
    found["most_dropped"] = rl_metrics.rank_dropped_tokens(counts["by_token"])
    found["most_clipped"] = rl_metrics.rank_dropped_tokens(counts["clipped"], num=32, min_dropped=0)
    steps = jax.device_get([metrics for _, metrics in updates])
    last = steps[-1]
    shares = {n.removeprefix("gradient/"): v for n, v in last.items() if n.startswith("gradient/")}
    histogram = rl_metrics.gradient_histogram(shares)
    found |= {f"gradient/decade_{name}": value for name, value in histogram.items()}
    found["gradient/below_1e-14"] = float(shares["below_1e-14"])
    for name in last:
        if not name.startswith("gradient/"):
            found[name] = float(np.mean([step[name] for step in steps]))
    found["skipped"] = float(sum(step["skipped"] for step in steps))
    found["updates"] = float(len(updates))
    return found
