"""One generation batch through the trainer: log-probabilities, advantages, updates, metrics.

A generation batch is cut into minibatches, each of which makes one optimizer step. A minibatch is
packed into microbatches of one fixed shape, whose gradients are added up. The order of work:

  1. Pack: every valid sample gets its place in a row, and its tokens' loss coefficients.
  2. Score: the trainer computes log-probabilities of all minibatches, before the first step.
  3. Compare: advantages come from the rewards of the whole batch.
  4. Update: one step a minibatch, in each epoch.

Steps 1 to 3 fill the same rows on the host, and step 4 puts them onto the devices.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from m1_jax import config as model_config_lib
from m1_jax import model as model_lib
from m1_jax import sharding
from train import optim
from train import step as step_lib
from train.rl import advantages, batch_metrics, groups, rollout_correction
from train.rl import batch as rl_batch
from train.rl import config as rl_config
from train.rl import loss as loss_lib
from train.rl import sample as sample_lib
from train.rl import step as rl_step


@dataclasses.dataclass(frozen=True)
class _BatchSample:
    """A sample of a generation batch.

    Attributes:
      index: number of the sample in the batch, from 0 through all groups. Per-sample arrays, such
        as advantages, are indexed by it.
      group_id: id of its group.
      sample: the sample itself.
    """

    index: int
    group_id: int
    sample: sample_lib.Sample


@dataclasses.dataclass(frozen=True)
class _Minibatch:
    """The valid samples of one optimizer step.

    Attributes:
      indices: `_BatchSample.index` of each packed sample, in the order of `packed.samples`.
      packed: the samples and their rows.
    """

    indices: list[int]
    packed: rl_batch.PackedSamples


class PolicyUpdater:
    """Trains on generation batches.

    Args:
      config: config of the run.
      model_config: config of the model.
      layout: layout of the trainer, None on a single device.
      optimizer: makes the steps.
      reference: the model that the KL term compares with, or None.
    """

    def __init__(
        self,
        config: rl_config.RlConfig,
        model_config: model_config_lib.ModelConfig,
        layout: sharding.MeshLayout | None,
        optimizer: optim.AdamW,
        reference: model_lib.MiniMaxM1 | None = None,
    ):
        self._config, self._layout, self._reference = config, layout, reference
        # None lets the trainer's routers choose the experts.
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
    ) -> tuple[step_lib.TrainState, batch_metrics.BatchReport]:
        """Make the updates of one batch, and return the state after them and the batch's report.

        Args:
          state: before the updates. It is donated.
          batch: groups whose samples are all finished and scored.
          batch_number: number of the batch in its run. It seeds the order of the groups.
          weight_version: version of the weights in `state`.

        Raises:
          FloatingPointError: no update had a finite gradient.
        """
        start_secs = time.perf_counter()
        numbered_groups = _number_samples(batch)
        samples = [sample for group in numbered_groups for sample in group]
        report = batch_metrics.measure_samples(
            [s.sample for s in samples], [s.group_id for s in samples]
        )
        metrics = report.metrics
        minibatches = [
            self._pack_minibatch(minibatch_groups)
            for minibatch_groups in self._split_minibatches(numbered_groups, batch_number)
        ]
        # A minibatch without a valid sample makes no step.
        minibatches = [minibatch for minibatch in minibatches if minibatch.indices]
        if not minibatches:
            metrics |= {"updates": 0.0, "training_secs": time.perf_counter() - start_secs}
            return state, report
        # All minibatches are scored before the first step, because logp_old is that of the weights
        # before the batch's updates.
        entropy = self._fill_logprobs(state.model, minibatches)
        scored_secs = time.perf_counter()
        mismatch = batch_metrics.measure_batch_mismatch(
            [minibatch.packed for minibatch in minibatches], weight_version
        )
        # Without a token of the present weights there is nothing to compare.
        report.pearson = mismatch["pearson"] if mismatch else None
        metrics |= mismatch
        metrics["entropy_old"] = entropy
        self._fill_advantages(minibatches, samples)
        state, updates = self._run_epochs(state, minibatches)
        metrics |= batch_metrics.merge_update_metrics(updates)
        if metrics["skipped"] == metrics["updates"]:
            raise FloatingPointError(
                f"batch {batch_number}: none of {len(updates)} updates had a finite gradient; "
                "begin a new run at a lower rate from an earlier checkpoint (m1-export --step)"
            )
        metrics["scoring_forward_secs"] = scored_secs - start_secs
        metrics["training_secs"] = time.perf_counter() - start_secs
        return state, report

    # ---- before the updates

    def _split_minibatches(
        self, numbered_groups: list[list[_BatchSample]], batch_number: int
    ) -> list[list[list[_BatchSample]]]:
        """Return the minibatches, each of whole groups, in an order drawn for this batch."""
        # The order depends on seed and number alone, so a restarted run and all processes draw
        # alike.
        rng = np.random.default_rng((self._config.seed, batch_number))
        order = rng.permutation(len(numbered_groups))
        # Groups stay whole: "prompt-mean" divides by a prompt's tokens in the step.
        return [
            [numbered_groups[i] for i in group_indices]
            for group_indices in np.array_split(order, self._config.update.minibatches)
        ]

    def _pack_minibatch(self, minibatch_groups: list[list[_BatchSample]]) -> _Minibatch:
        valid = [s for group in minibatch_groups for s in group if s.sample.valid]
        packed = rl_batch.pack_samples(
            [s.sample for s in valid],
            self._config.update.rows,
            self._config.update.row_tokens or self._config.rollout.max_sample_tokens,
            self._expert_ids_shape,
        )
        # The coefficients need the masks of the whole step, and nothing that a model computes.
        lengths = np.array([sum(s.sample.mask) for s in valid])
        group_ids = np.array([s.group_id for s in valid])
        coefficients = loss_lib.token_coefficients(
            self._config.objective, lengths, group_ids, np.ones(len(valid), bool)
        )
        packed.fill("coefficients", list(coefficients))
        return _Minibatch([s.index for s in valid], packed)

    def _fill_logprobs(self, model: model_lib.MiniMaxM1, minibatches: list[_Minibatch]) -> float:
        """Write the trainer's log-probabilities into the rows, and return the mean entropy."""
        scores, temperature = [], self._settings.temperature
        # `HostRows` are filled in place, so a later loop over the minibatches finds the scores.
        for host_rows in (rows for m in minibatches for rows in m.packed.microbatches):
            rows = rl_batch.device_put_rows(host_rows, self._layout)
            logp, entropy = rl_step.score_logprobs(model, rows, temperature)
            logp_ref = None
            if self._reference is not None:
                logp_ref, _ = rl_step.score_logprobs(self._reference, rows, temperature)
            scores.append((host_rows, logp, entropy, logp_ref))
        # The scores are fetched once all are dispatched, so the devices never wait for the host.
        entropy_sum, num_tokens = 0.0, 0.0
        for host_rows, logp, entropy, logp_ref in scores:
            real = host_rows.mask > 0
            # A `where`, not a product: the score of padding may be infinite or NaN.
            host_rows.logp_old[:] = np.where(real, rl_batch.gather_to_host(logp), 0)
            if logp_ref is not None:
                host_rows.logp_ref[:] = np.where(real, rl_batch.gather_to_host(logp_ref), 0)
            entropy_sum += float(np.sum(np.where(real, rl_batch.gather_to_host(entropy), 0)))
            num_tokens += float(np.sum(real))
        return entropy_sum / max(num_tokens, 1.0)

    def _fill_advantages(self, minibatches: list[_Minibatch], samples: list[_BatchSample]) -> None:
        """Write the advantages into the rows.

        They compare all samples of the batch, not those of a minibatch. A sample's advantage is one
        number, or one a token where returns or rewards of turns make its tokens differ.
        """
        objective = self._config.objective
        # A sample without a reward is not valid, so its 0 counts nowhere.
        rewards = [0.0 if s.sample.reward is None else s.sample.reward for s in samples]
        group_ids = [s.group_id for s in samples]
        valid = [s.sample.valid for s in samples]
        turn_rewards = [s.sample.turn_rewards for s in samples]
        if objective.advantage.startswith("return") or any(turn_rewards):
            kls = None
            if objective.reward_kl_coef:
                # Samples that are not valid lie in no row, and keep these zeros.
                kls = [np.zeros(len(s.sample.tokens)) for s in samples]
                for minibatch in minibatches:
                    gaps = minibatch.packed.extract(
                        [rows.logp_old - rows.logp_ref for rows in minibatch.packed.microbatches]
                    )
                    for index, gap in zip(minibatch.indices, gaps, strict=True):
                        kls[index] = gap
            masks = [np.asarray(s.sample.mask) for s in samples]
            values = advantages.token_advantages(
                objective, rewards, group_ids, valid, masks, turn_rewards, kls
            )
        else:
            values = list(advantages.sample_advantages(objective, rewards, group_ids, valid))
        for minibatch in minibatches:
            minibatch.packed.fill("advantages", [values[index] for index in minibatch.indices])

    # ---- the updates

    def _run_epochs(
        self, state: step_lib.TrainState, minibatches: list[_Minibatch]
    ) -> tuple[step_lib.TrainState, list[batch_metrics.UpdateMetrics]]:
        """Make one optimizer step for each minibatch, in each epoch."""
        updates: list[batch_metrics.UpdateMetrics] = []
        for _ in range(self._config.update.epochs):
            for minibatch in minibatches:
                # The old state is donated, so only the new one exists from here on.
                state, update_metrics = self._update_minibatch(state, minibatch.packed)
                updates.append(update_metrics)
        return state, updates

    def _update_minibatch(
        self, state: step_lib.TrainState, packed: rl_batch.PackedSamples
    ) -> tuple[step_lib.TrainState, batch_metrics.UpdateMetrics]:
        """Make one optimizer step. Its metrics stay on the devices, so nothing waits for it."""
        weight_mean = self._mean_correction_weight(packed)
        sums: rl_step.MicrobatchSums | None = None
        # All tokens, prompts too: these shares weigh the routers' balance loss.
        num_tokens = [float(np.sum(rows.segment_ids > 0)) for rows in packed.microbatches]
        for host_rows, row_tokens in zip(packed.microbatches, num_tokens, strict=True):
            rows = rl_batch.device_put_rows(host_rows, self._layout)
            token_share = np.float32(row_tokens / sum(num_tokens))
            # `sums` is donated: one copy of the gradients is enough.
            sums = rl_step.accumulate_gradients(
                sums, state.model, rows, token_share, weight_mean, self._settings
            )
        assert sums is not None, "a minibatch has a valid sample, and so a microbatch"
        state, step_metrics = rl_step.apply_update(state, sums.gradients, self._settings)
        return state, batch_metrics.UpdateMetrics(sums.metrics, step_metrics)

    def _mean_correction_weight(self, packed: rl_batch.PackedSamples) -> np.float32 | None:
        """Return the mean correction weight of a step's tokens, if the correction divides by it.

        It is a mean over all microbatches, so it is known before the first of them is computed.
        """
        correction = self._config.objective.correction
        if correction is None or not correction.normalise:
            return None
        totals = np.zeros(2)  # sum of weights, and number of tokens
        for rows in packed.microbatches:
            mask = jnp.asarray(rows.mask)
            weight, _ = rollout_correction.correction_weights(
                correction,
                jnp.asarray(rows.logp_old),
                jnp.asarray(rows.logp_rollout),
                mask,
                jnp.asarray(rows.segment_ids),
            )
            totals += np.asarray(rollout_correction.weight_sum_and_count(weight, mask))
        return np.float32(totals[0] / max(totals[1], 1.0))


def _number_samples(batch: Sequence[groups.SampleGroup]) -> list[list[_BatchSample]]:
    """Return the samples of each group, numbered from 0 through the batch."""
    numbers = itertools.count()
    return [
        [
            _BatchSample(next(numbers), group.group_id, sample)
            for sample in groups.finished_samples(group)
        ]
        for group in batch
    ]
