"""One generation batch through the trainer: log-probabilities, advantages, updates, metrics.

The order of work:

  1. Score: the trainer computes log-probabilities of all valid samples, before the first step.
  2. Compare: advantages come from the rewards of the whole batch.
  3. Update: the batch is cut into minibatches. Each makes one optimizer step, in each epoch.

Samples are packed into rows twice: those of the whole batch to be scored, and those of each
minibatch to be trained on. The gradients of a minibatch's microbatches are added up. Rows are made
when their microbatch goes to the devices, and what is known of each sample stays with the sample.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from m1_jax import config as model_config_lib
from m1_jax import model as model_lib
from m1_jax import process_watch, sharding
from train import optim
from train import step as step_lib
from train.rl import advantages, batch_metrics, groups, rollout_correction, row_packing
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
class _TokenValues:
    """What the trainer knows of each valid sample's answer, by `_BatchSample.index`.

    Attributes:
      logp_old: log-probability of each token, before the batch's updates, [tokens] float32. 0 where
        the model did not write the token.
      logp_ref: the same by the reference model, empty without one.
      advantages: what each token is worth, [tokens], or one number for all.
    """

    logp_old: dict[int, np.ndarray]
    logp_ref: dict[int, np.ndarray]
    advantages: dict[int, Any] = dataclasses.field(default_factory=dict)


class PolicyUpdater:
    """Trains on generation batches.

    Args:
      config: config of the run.
      model_config: config of the model.
      layout: layout of the trainer, None on a single device.
      optimizer: makes the steps.
      reference: the model that the KL term compares with, or None.

    Raises:
      ValueError: rows that the layout cannot split evenly.
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
        self._row_shapes = row_packing.make_row_shapes(
            config.update.rows,
            config.update.row_tokens or config.rollout.max_sample_tokens,
            layout,
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
        minibatches = self._split_minibatches(numbered_groups, batch_number)
        # A minibatch without a valid sample makes no step.
        minibatches = [minibatch for minibatch in minibatches if minibatch]
        if not minibatches:
            metrics |= {"updates": 0.0, "training_secs": time.perf_counter() - start_secs}
            return state, report
        valid = [s for s in samples if s.sample.valid]
        # All minibatches are scored before the first step, because logp_old is that of the weights
        # before the batch's updates.
        values, scoring_metrics = self._score_samples(state.model, valid)
        scored_secs = time.perf_counter()
        mismatch = batch_metrics.measure_batch_mismatch(
            [s.sample for s in valid], [values.logp_old[s.index] for s in valid], weight_version
        )
        # Absent without a token of the present weights.
        report.pearson = mismatch.get("pearson")
        metrics |= mismatch | scoring_metrics
        values = dataclasses.replace(values, advantages=self._compute_advantages(samples, values))
        packed = [
            self._pack_minibatch(minibatch, values, weight_version) for minibatch in minibatches
        ]
        metrics |= _packing_metrics("update", packed)
        state, updates = self._run_epochs(state, packed)
        metrics |= batch_metrics.merge_update_metrics(updates)
        if metrics["skipped"] == metrics["updates"]:
            raise FloatingPointError(
                f"batch {batch_number}: none of {len(updates)} updates had a finite gradient; "
                "give the same command with a lower rate, --set=update.learning_rate=RATE "
                "--allow_change=update.learning_rate, and perhaps --from_step=N"
            )
        metrics["scoring_forward_secs"] = scored_secs - start_secs
        metrics["training_secs"] = time.perf_counter() - start_secs
        return state, report

    # ---- before the updates

    def _split_minibatches(
        self, numbered_groups: list[list[_BatchSample]], batch_number: int
    ) -> list[list[_BatchSample]]:
        """Return each minibatch's valid samples. Groups stay whole, in an order that is drawn."""
        # The order depends on seed and number alone, so a restarted run and all processes draw
        # alike.
        rng = np.random.default_rng((self._config.seed, batch_number))
        order = rng.permutation(len(numbered_groups))
        # Groups stay whole: "prompt-mean" divides by a prompt's tokens in the step.
        return [
            [s for i in group_indices for s in numbered_groups[i] if s.sample.valid]
            for group_indices in np.array_split(order, self._config.update.minibatches)
        ]

    def _pack(self, samples: Sequence[_BatchSample]) -> rl_batch.PackedSamples:
        return rl_batch.pack_samples(
            [s.sample for s in samples], self._row_shapes, self._expert_ids_shape
        )

    def _pack_minibatch(
        self, minibatch: list[_BatchSample], values: _TokenValues, weight_version: int
    ) -> rl_batch.PackedSamples:
        """Return a minibatch's valid samples in rows, with all that its gradients need.

        The column logp_old is what r compares with, see `_anchor_logprobs`.
        """
        packed = self._pack(minibatch)
        lengths = np.array([s.sample.num_generated for s in minibatch])
        group_ids = np.array([s.group_id for s in minibatch])
        coefficients = loss_lib.token_coefficients(
            self._config.objective, lengths, group_ids, np.ones(len(minibatch), bool)
        )
        packed.fill("coefficients", list(coefficients))
        packed.fill(
            "logp_old",
            [
                self._anchor_logprobs(s.sample, values.logp_old[s.index], weight_version)
                for s in minibatch
            ],
        )
        for name in ("logp_ref", "advantages"):
            by_index = getattr(values, name)
            if by_index:
                packed.fill(name, [by_index[s.index] for s in minibatch])
        return packed

    def _anchor_logprobs(
        self, sample: sample_lib.Sample, logp_old: np.ndarray, weight_version: int
    ) -> np.ndarray:
        """Return what r of each token compares with under anchor "old", [tokens] float32.

        The trainer's log-probabilities belong to the present weights. Compared with them, a token
        that older weights sampled would have a ratio near 1, however unlikely it is by now.
        """
        if not self._config.objective.anchors_stale_tokens:
            return logp_old
        is_stale = (sample.mask > 0) & (sample.versions < weight_version)
        return np.where(is_stale, sample.logprobs, logp_old)

    def _score_samples(
        self, model: model_lib.MiniMaxM1, valid: list[_BatchSample]
    ) -> tuple[_TokenValues, dict[str, float]]:
        """Return the trainer's log-probabilities of all valid samples, and metrics of scoring."""
        packed, temperature = self._pack(valid), self._settings.temperature
        values, entropy_sum = _TokenValues({}, {}), 0.0

        def take_scores(microbatch: int, scores: Sequence[jax.Array | None]) -> None:
            nonlocal entropy_sum
            for name, array in zip(("logp_old", "logp_ref", "entropy"), scores, strict=True):
                if array is None:
                    continue
                parts = packed.extract(microbatch, rl_batch.gather_to_host(array))
                for i, part in parts.items():
                    # A `where`, not a product: the score of padding may be infinite or NaN.
                    part = np.where(valid[i].sample.mask > 0, part, 0)
                    if name == "entropy":
                        entropy_sum += float(np.sum(part, dtype=np.float64))
                    else:
                        getattr(values, name)[valid[i].index] = part

        waiting: collections.deque[tuple[int, Sequence[jax.Array | None]]] = collections.deque()
        for microbatch in range(packed.num_microbatches):
            # A batch may compile a program for each shape, which takes minutes.
            process_watch.note_progress()
            rows = rl_batch.device_put_microbatch(packed, microbatch, self._layout)
            logp, entropy = rl_step.score_logprobs(model, rows, temperature)
            logp_ref = None
            if self._reference is not None:
                logp_ref, _ = rl_step.score_logprobs(self._reference, rows, temperature)
            waiting.append((microbatch, (logp, logp_ref, entropy)))
            # One microbatch computes while the host makes the next one and takes the last one's
            # scores. More ahead would hold the rows of more of them.
            if len(waiting) > 2:
                take_scores(*waiting.popleft())
        while waiting:
            take_scores(*waiting.popleft())
        num_tokens = sum(s.sample.num_generated for s in valid)
        metrics = {"entropy_old": entropy_sum / max(num_tokens, 1)}
        return values, metrics | _packing_metrics("scoring", [packed])

    def _compute_advantages(
        self, samples: list[_BatchSample], values: _TokenValues
    ) -> dict[int, Any]:
        """Return the advantages of all samples, by index.

        They compare all samples of the batch, not those of a minibatch. A sample's advantage is one
        number, or one a token where returns or rewards of turns make its tokens differ.
        """
        objective = self._config.objective
        # A sample without a reward is not valid, so its 0 counts nowhere.
        rewards = [0.0 if s.sample.reward is None else s.sample.reward for s in samples]
        group_ids = [s.group_id for s in samples]
        valid = [s.sample.valid for s in samples]
        turn_rewards = [s.sample.turn_rewards for s in samples]
        if not objective.advantage.startswith("return") and not any(turn_rewards):
            of_samples = advantages.sample_advantages(objective, rewards, group_ids, valid)
            return dict(enumerate(of_samples.tolist()))
        kls = None
        if objective.reward_kl_coef:
            # Samples that are not valid were not scored, and have zeros.
            kls = [
                values.logp_old[s.index] - values.logp_ref[s.index]
                if s.sample.valid
                else np.zeros(len(s.sample.tokens))
                for s in samples
            ]
        masks = [s.sample.mask for s in samples]
        of_tokens = advantages.token_advantages(
            objective, rewards, group_ids, valid, masks, turn_rewards, kls
        )
        # They are computed in float64, and a batch of them is large.
        return {i: of_sample.astype(np.float32) for i, of_sample in enumerate(of_tokens)}

    # ---- the updates

    def _run_epochs(
        self, state: step_lib.TrainState, minibatches: list[rl_batch.PackedSamples]
    ) -> tuple[step_lib.TrainState, list[batch_metrics.UpdateMetrics]]:
        """Make one optimizer step for each minibatch, in each epoch."""
        updates: list[batch_metrics.UpdateMetrics] = []
        for _ in range(self._config.update.epochs):
            for packed in minibatches:
                # The old state is donated, so only the new one exists from here on.
                state, update_metrics = self._update_minibatch(state, packed)
                updates.append(update_metrics)
        return state, updates

    def _update_minibatch(
        self, state: step_lib.TrainState, packed: rl_batch.PackedSamples
    ) -> tuple[step_lib.TrainState, batch_metrics.UpdateMetrics]:
        """Make one optimizer step. Its metrics stay on the devices, so nothing waits for it."""
        weight_mean = self._mean_correction_weight(packed)
        sums: rl_step.MicrobatchSums | None = None
        # All tokens, prompts too: these shares weigh the routers' balance loss.
        num_tokens = packed.num_tokens
        for microbatch, row_tokens in enumerate(num_tokens):
            process_watch.note_progress()
            rows = rl_batch.device_put_microbatch(packed, microbatch, self._layout)
            token_share = np.float32(row_tokens / sum(num_tokens))
            # `sums` is donated: one copy of the gradients is enough.
            sums = rl_step.accumulate_gradients(
                sums, state.model, rows, token_share, weight_mean, self._settings
            )
        assert sums is not None, "a minibatch has a valid sample, and so a microbatch"
        num_signal_tokens = rl_step.count_signal_tokens(sums.metrics, self._config.objective)
        state, step_metrics = rl_step.apply_update(
            state, sums.gradients, self._settings, num_signal_tokens
        )
        return state, batch_metrics.UpdateMetrics(sums.metrics, step_metrics)

    def _mean_correction_weight(self, packed: rl_batch.PackedSamples) -> np.float32 | None:
        """Return the mean correction weight of a step's tokens, if the correction divides by it."""
        correction = self._config.objective.correction
        if correction is None or not correction.normalise:
            return None
        logp_old = packed.values("logp_old")
        mean = rollout_correction.mean_correction_weight(
            correction,
            (
                (logp[sample.mask > 0], sample.logprobs[sample.mask > 0])
                for sample, logp in zip(packed.samples, logp_old, strict=True)
            ),
        )
        return np.float32(mean)


def _packing_metrics(kind: str, packed: Sequence[rl_batch.PackedSamples]) -> dict[str, float]:
    """Return which share of the computed places holds a token, and the number of microbatches."""
    num_tokens = sum(sum(p.num_tokens) for p in packed)
    return {
        f"utilisation/{kind}": num_tokens / max(sum(p.plan.num_places for p in packed), 1),
        f"microbatches/{kind}": float(sum(p.num_microbatches for p in packed)),
    }


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
