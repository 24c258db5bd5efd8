"""Schema of a reinforcement-learning run: what `configs/cispo_*.py` and their like return."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from m1_jax import config as model_config
from m1_jax import configlib
from train import config as config_lib
from train import lora as lora_lib
from train.rl import curriculum, length_schedule, tasks
from train.rl import objective as objective_lib
from train.rl import outcomes as outcomes_lib
from train.rl.rewards import compose, length_bias

# A config file imports this module alone.
OptimizerConfig = config_lib.OptimizerConfig
SaveConfig = config_lib.SaveConfig
LogConfig = config_lib.LogConfig
Objective = objective_lib.Objective
PRESETS = objective_lib.PRESETS
TaskSource = tasks.TaskSource
LengthSchedule = length_schedule.LengthSchedule
RewardsConfig = compose.RewardsConfig
CurriculumConfig = curriculum.CurriculumConfig
PassRateConfig = curriculum.PassRateConfig
LoraConfig = lora_lib.LoraConfig
LengthBiasConfig = length_bias.LengthBiasConfig


# Above the classes, because fields' defaults are made, and so checked, while this file loads.
def _check_minimums(config: Any, section: str, minimums: Mapping[str, float]) -> None:
    """Raise ValueError where a field of a section of the config is below its minimum."""
    for name, minimum in minimums.items():
        path = f"{section}.{name}" if section else name
        value = getattr(config, name)
        configlib.check_field(value >= minimum, path, value, f"at least {minimum}")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What is sampled for one generation batch.

    Attributes:
      groups: tasks in a batch, at least 1.
      windows: how long an answer may be, tokens.
      max_prompt_tokens: tokens of a prompt, at least 1. A longer prompt is an error.
      group_size: samples of a task, at least 2, as advantages compare them.
      dynamic: leave out groups whose outcomes, or rewards, are all the same, and sample others in
        their place (DAPO's dynamic sampling).
      max_rounds: rounds of sampling for one batch, at least 1. After the last the batch goes on
        with the groups that it has.
      oversample: groups that are begun for each that is needed, at least 1.0.
      partial_tokens: tokens that a sample may add in one round. It goes on in the next round, which
        may be the next batch's with new weights. 0 finishes all samples in their round.
      max_staleness: versions of the weights, at least 0. A sample that would be older in the next
        batch may finish in this one, whatever `partial_tokens` says. A group that waited until one
        of its tokens was older is dropped, and counted in the metric groups_stale.
      overlong_buffer_tokens: tokens at the window's end over which the reward falls by up to 1
        (DAPO's soft overlong penalty), 0 to the first window. 0 is no penalty.
      mask_truncated: a sample that filled its window is not trained on. Pass rates count it.
      mask_repetition: a sample that ended in a loop is not trained on. Pass rates count it.
      temperature: temperature of sampling and of the trainer's probabilities, more than 0.
      top_p: sample from the likeliest tokens that have this probability together, up to 1.0, which
        is off. The trainer does not have the probabilities that top_p, top_k or min_p make, so
        these bias its ratios.
      top_k: sample from so many of the likeliest tokens. 0 is off.
      min_p: sample from tokens with at least this share of the likeliest one's probability. 0.0 is
        off.
      stop_on_loop: end an answer that is stuck in a loop, see `rollout.RolloutSampling`.
      engine: (field, value) pairs of `infer.config.EngineConfig`.
      replay_routes: the trainer sends tokens to the experts that the sampler chose.
    """

    groups: int
    windows: LengthSchedule
    max_prompt_tokens: int
    group_size: int = 8
    dynamic: bool = True
    max_rounds: int = 4
    oversample: float = 1.0
    partial_tokens: int = 0
    max_staleness: int = 1
    overlong_buffer_tokens: int = 0
    mask_truncated: bool = False
    mask_repetition: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_on_loop: bool = True
    engine: tuple[tuple[str, Any], ...] = ()
    replay_routes: bool = False

    def __post_init__(self):
        minimums = {"groups": 1, "max_prompt_tokens": 1, "max_rounds": 1, "group_size": 2}
        minimums |= {"partial_tokens": 0, "max_staleness": 0, "oversample": 1}
        _check_minimums(self, "rollout", minimums)
        first_window = self.windows.tokens[0]
        configlib.check_field(
            0 <= self.overlong_buffer_tokens <= first_window,
            "rollout.overlong_buffer_tokens",
            self.overlong_buffer_tokens,
            f"0 to the first window, {first_window}",
        )
        # More than 0: greedy sampling has no probabilities that a ratio could compare.
        configlib.check_field(
            self.temperature > 0, "rollout.temperature", self.temperature, "more than 0"
        )

    @property
    def max_sample_tokens(self) -> int:
        """Return the length of the longest prompt and answer together, in the last window."""
        return self.max_prompt_tokens + self.windows.tokens[-1]


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Episodes of several turns with tools. The window bounds all turns together.

    Attributes:
      environment: "files", "repair" or "lookup", see `train/rl/environments`.
      max_turns: turns of an episode, at least 1.
      turn_tokens: tokens that the model may write in a turn, at least 1.
      tool_workers: calls of environments that may run at the same time, at least 1.
      tool_limit_secs: how long one call of an environment may run, above 0. A call that runs longer
        makes its sample invalid, and is counted in the metric tools_timed_out.
    """

    environment: str
    max_turns: int = 8
    turn_tokens: int = 1024
    tool_workers: int = 8
    tool_limit_secs: float = 600.0

    def __post_init__(self):
        _check_minimums(self, "agent", {"max_turns": 1, "turn_tokens": 1, "tool_workers": 1})
        limit_secs = self.tool_limit_secs
        configlib.check_field(limit_secs > 0, "agent.tool_limit_secs", limit_secs, "more than 0")


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How a generation batch becomes optimizer steps.

    Attributes:
      learning_rate: constant after the warm-up, at least 0.
      minibatches: optimizer steps that share the batch's groups, a divisor of `rollout.groups`.
        M1 makes 16 off-policy updates.
      epochs: passes over all minibatches, at least 1.
      rows: the most rows of a microbatch, at least 1, and a multiple of what the mesh's data, fsdp
        and expert axes split them into. Where half or a quarter of the rows hold what is left, a
        microbatch has so many.
      row_tokens: tokens of the longest row. 0 is the longest sample,
        `RolloutConfig.max_sample_tokens`. Rows are as long as the samples of a microbatch need, in
        few compiled lengths (`train/rl/row_packing.py`). These are multiples of 128 and of what
        the mesh splits a row into, so that the longest may be somewhat longer than this number.
      warmup_steps: optimizer steps in which the learning rate warms up, at least 0.
      balance: coefficient of the routers' balance loss.
    """

    learning_rate: float
    minibatches: int = 16
    epochs: int = 1
    rows: int = 1
    row_tokens: int = 0
    warmup_steps: int = 0
    balance: float = 0.0

    def __post_init__(self):
        minimums = {"minibatches": 1, "epochs": 1, "rows": 1, "learning_rate": 0, "warmup_steps": 0}
        _check_minimums(self, "update", minimums)


@dataclasses.dataclass(frozen=True)
class RlEvaluationConfig:
    """The mean reward of held-out tasks, before the first batch, on the way and after the last.

    Attributes:
      sources: sources of held-out tasks.
      every_batches: batches between two evaluations. 0 is never.
      samples: samples of each task, at least 1.
      temperature: temperature of sampling. 0 is greedy.
    """

    sources: tuple[TaskSource, ...] = ()
    every_batches: int = 0
    samples: int = 1
    temperature: float = 0.0

    def __post_init__(self):
        _check_minimums(self, "evaluation", {"every_batches": 0, "samples": 1, "temperature": 0})
        configlib.check_field(
            self.every_batches == 0 or bool(self.sources),
            "evaluation.sources",
            self.sources,
            "a source, as every_batches is not 0",
        )


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """One run of reinforcement learning.

    Attributes:
      checkpoint: directory of the first weights, a release or a converted one.
      batches: generation batches in all, at least 1.
      sources: sources of tasks, with different names.
      rollout: what is sampled for a batch.
      update: how a batch is trained on.
      rewards: what scores samples. None where an agent's environment gives all rewards. With an
        agent these rewards add to those of its environment.
      outcomes: (source, outcome) pairs, "*" being every other source. An outcome is the part of the
        reward that says whether an answer is right: a reward, a part REWARD/PART of it, or of an
        agent "environment", "final" or "turns". 1 and more is right. Dynamic sampling and pass
        rates read it, never the sum that is trained on. A source that is not named has its
        environment's reward, or its first reward but "format" and "repetition" whose weight is
        above 0.
      objective: the loss.
      agent: turns with tools. None for answers of one turn.
      curriculum: weights of the sources by batch. None weighs all alike.
      pass_rates: leaves out tasks that are too easy or too hard. None leaves out none.
      length_bias: watches the judge of each source that has one, whether it likes long answers.
        None watches none.
      tokenizer: directory of the tokenizer. Empty takes the checkpoint's.
      dtype: dtype of the computation, "bfloat16" or "float32".
      remat: policy of rematerialisation, see `m1_jax.config.REMAT_POLICIES`. Empty takes the
        checkpoint's.
      lightning: implementation of lightning attention, see `ModelConfig`. Empty takes the kernels
        where they run.
      lora: adapters to train. None trains the weights themselves.
      mesh: (axis, devices) pairs of the trainer. Empty is fsdp over all devices.
      serving_mesh: (axis, devices) pairs of the sampler on the same devices. Empty is expert over
        all devices.
      optimizer: AdamW's numbers.
      evaluation: how held-out tasks are evaluated.
      pearson_min: correlation of the sampler's and the trainer's probabilities, -1 to 1. A batch
        below it writes an alarm to the log.
      max_skipped: batches in a row that change no weight after which the run stops, at least 1.
      save: when checkpoints are written. Its steps are batches.
      log: what is logged. Its steps are batches.
      seed: seed of tasks, samples, the order of groups, and adapters.
      compilation_cache: directory of compiled programs. Empty is ~/.cache/m1_jax/xla.

    Raises:
      ValueError: a field out of range, or fields that contradict each other.
    """

    checkpoint: str
    batches: int
    sources: tuple[TaskSource, ...]
    rollout: RolloutConfig
    update: UpdateConfig
    rewards: RewardsConfig | None = None
    outcomes: tuple[tuple[str, str], ...] = ()
    objective: Objective = PRESETS["cispo"]  # the paper's own
    agent: AgentConfig | None = None
    curriculum: CurriculumConfig | None = None
    pass_rates: PassRateConfig | None = None
    length_bias: LengthBiasConfig | None = None
    tokenizer: str = ""
    dtype: str = "bfloat16"
    remat: str = ""
    lightning: str = ""
    lora: LoraConfig | None = None
    mesh: tuple[tuple[str, int], ...] = ()
    serving_mesh: tuple[tuple[str, int], ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: RlEvaluationConfig = RlEvaluationConfig()
    pearson_min: float = 0.99  # M1 3.2: 0.9x at first, 0.99x with a float32 head
    max_skipped: int = 10
    save: SaveConfig = SaveConfig(every_steps=1)
    log: LogConfig = LogConfig(every_steps=1)
    seed: int = 0
    compilation_cache: str = ""

    def __post_init__(self):
        _check_minimums(self, "", {"batches": 1, "max_skipped": 1})
        configlib.check_field(bool(self.sources), "sources", self.sources, "at least one")
        configlib.check_field(bool(self.checkpoint), "checkpoint", self.checkpoint, "a directory")
        configlib.check_field(
            self.dtype in ("bfloat16", "float32"), "dtype", self.dtype, "bfloat16 or float32"
        )
        policies = ("", *model_config.REMAT_POLICIES)
        configlib.check_field(self.remat in policies, "remat", self.remat, f"one of {policies}")
        implementations = ("", *model_config.LIGHTNING_IMPLEMENTATIONS)
        configlib.check_field(
            self.lightning in implementations,
            "lightning",
            self.lightning,
            f"one of {implementations}",
        )
        # The parts check themselves. What is left is what takes two parts to know.
        self._check_sources()
        self.outcome_reader()  # raises for an outcome that no sample would have
        self._check_batch_shape()
        self._check_stale_tokens()

    def _check_sources(self) -> None:
        """Check that every source has a name of its own, and rewards."""
        names = [source.name for source in self.sources]
        configlib.check_field(len(set(names)) == len(names), "sources", names, "different names")
        unknown = set(self.curriculum.sources) - set(names) if self.curriculum else set()
        configlib.check_field(not unknown, "curriculum", sorted(unknown), f"sources of {names}")
        configlib.check_field(
            bool(self.rewards or self.agent),
            "rewards",
            self.rewards,
            "some, as there is no agent whose environment gives them",
        )
        if self.rewards is None:
            return
        rewarded = {name for name, _ in self.rewards.sources}
        if compose.ANY_SOURCE in rewarded:
            return
        # Held-out tasks are scored by the same rewards.
        all_sources = (*self.sources, *self.evaluation.sources)
        unrewarded = sorted({source.name for source in all_sources} - rewarded)
        configlib.check_field(
            not unrewarded,
            "rewards.sources",
            f"none for {', '.join(unrewarded)}",
            f"rewards for every source of tasks, or for {compose.ANY_SOURCE!r}",
        )

    def _check_batch_shape(self) -> None:
        """Check that `rollout`, `update` and `agent` fit each other."""
        num_groups, num_minibatches = self.rollout.groups, self.update.minibatches
        configlib.check_field(
            num_groups % num_minibatches == 0,
            "update.minibatches",
            num_minibatches,
            f"a divisor of rollout.groups = {num_groups}, as groups stay whole",
        )
        # A sample lies whole in one row, so the longest must fit.
        row_tokens, longest_sample = self.update.row_tokens, self.rollout.max_sample_tokens
        configlib.check_field(
            row_tokens == 0 or row_tokens >= longest_sample,
            "update.row_tokens",
            row_tokens,
            f"0, or at least {longest_sample}, the longest sample",
        )
        # A paused sample is begun again from its tokens, but an environment cannot be.
        partial_tokens = self.rollout.partial_tokens
        configlib.check_field(
            self.agent is None or partial_tokens == 0,
            "rollout.partial_tokens",
            partial_tokens,
            "0 with an agent: its environment cannot wait",
        )

    def _check_stale_tokens(self) -> None:
        """Check that what older weights sampled is corrected, where it may be trained on."""
        objective, rollout = self.objective, self.rollout
        may_be_stale = rollout.partial_tokens > 0 or rollout.oversample > 1
        has_weight = objective.weighted or objective.correction is not None
        configlib.check_field(
            not may_be_stale or has_weight or objective.stale_anchor == "old",
            "objective.correction",
            None,
            f"one, as objective {objective.name} has no ratio and rollout.partial_tokens or "
            'oversample makes tokens of older weights; or objective.stale_anchor "old", which '
            "leaves them uncorrected",
        )

    def outcome_reader(self) -> outcomes_lib.OutcomeReader:
        """Return what reads the outcomes of this run's samples."""
        sources = [source.name for source in self.sources]
        return outcomes_lib.OutcomeReader(
            sources, self.rewards, self.agent is not None, self.outcomes
        )

    def task_curriculum(self) -> CurriculumConfig:
        """Return the curriculum, or one of equal weights."""
        if self.curriculum is not None:
            return self.curriculum
        # One point of the schedule, at step 0: the weights never change.
        weights = tuple((source.name, 1.0) for source in self.sources)
        return CurriculumConfig(weights=((0, weights),), seed=self.seed)
