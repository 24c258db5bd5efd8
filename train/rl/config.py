"""Schema of a reinforcement-learning run: what `configs/cispo_*.py` and their like return."""

import dataclasses
from typing import Any

from m1_jax import config as model_config
from m1_jax import configlib
from train import config as config_lib
from train import lora as lora_lib
from train.rl import curriculum, length_schedule, tasks
from train.rl import objective as objective_lib
from train.rl.rewards import compose, length_bias

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


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What is sampled for one generation batch.

    groups, group_size: tasks, and samples of each. max_prompt_tokens: a longer prompt is an error.
    windows: how long answers may be.
    dynamic: groups whose rewards are all the same are left out, and others sampled in their place,
      in at most `max_rounds` rounds; then the batch goes on with what it has (DAPO).
    oversample: groups that are begun for each that is needed.
    partial_tokens: what a sample may add in one round; it goes on in the next, which may be the
      next batch's with new weights. One that would be more than `max_staleness` versions old by
      then may finish. 0: all samples are finished in their round.
    overlong_buffer_tokens: of the window's end, where the reward falls by up to 1 (DAPO); 0 off.
    mask_truncated, mask_repetition: such samples count for nothing.
    temperature, top_p, top_k, min_p, stop_on_loop: see `rollout.RolloutSampling`.
    engine: (field, value) pairs of `infer.config.Config`. replay_routes: the trainer sends tokens
      to the experts that the sampler chose.
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
        for name in ("groups", "max_prompt_tokens", "max_rounds"):
            configlib.check_field(
                getattr(self, name) >= 1, f"rollout.{name}", getattr(self, name), "at least 1"
            )
        configlib.check_field(
            self.group_size >= 2, "rollout.group_size", self.group_size, "at least 2"
        )
        for name in ("partial_tokens", "max_staleness"):
            configlib.check_field(
                getattr(self, name) >= 0, f"rollout.{name}", getattr(self, name), "at least 0"
            )
        configlib.check_field(
            self.oversample >= 1, "rollout.oversample", self.oversample, "at least 1"
        )
        fits = 0 <= self.overlong_buffer_tokens <= self.windows.tokens[0]
        wanted = f"0 to the first window, {self.windows.tokens[0]}"
        name = "rollout.overlong_buffer_tokens"
        configlib.check_field(fits, name, self.overlong_buffer_tokens, wanted)
        configlib.check_field(
            self.temperature > 0, "rollout.temperature", self.temperature, "more than 0"
        )

    @property
    def max_sample_tokens(self) -> int:
        """Return the longest prompt and answer together."""
        return self.max_prompt_tokens + self.windows.tokens[-1]


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Turns with tools. environment: "files", "repair" or "lookup", see `train/environments`.

    max_turns, turn_tokens: at most of an episode, and tokens in each; the window bounds them all.
    """

    environment: str
    max_turns: int = 8
    turn_tokens: int = 1024

    def __post_init__(self):
        for name in ("max_turns", "turn_tokens"):
            configlib.check_field(
                getattr(self, name) >= 1, f"agent.{name}", getattr(self, name), "at least 1"
            )


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How a generation batch becomes optimizer steps.

    minibatches: steps that share the batch's groups; M1's 16 off-policy updates. epochs: how often
    all of them are gone through. rows: in a microbatch. row_tokens: of each row; 0 is the longest
    sample's `RolloutConfig.max_sample_tokens`, and more packs short samples better. warmup_steps:
    of the learning rate, which then stays. balance: of the routers' balance loss.
    """

    learning_rate: float
    minibatches: int = 16
    epochs: int = 1
    rows: int = 1
    row_tokens: int = 0
    warmup_steps: int = 0
    balance: float = 0.0

    def __post_init__(self):
        for name in ("minibatches", "epochs", "rows"):
            configlib.check_field(
                getattr(self, name) >= 1, f"update.{name}", getattr(self, name), "at least 1"
            )
        configlib.check_field(
            self.learning_rate >= 0, "learning_rate", self.learning_rate, "at least 0"
        )
        configlib.check_field(
            self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0"
        )


@dataclasses.dataclass(frozen=True)
class RlEvaluationConfig:
    """Mean reward of held-out tasks, before the first batch, every so many batches and at the end.

    samples: of each task, at `temperature` (0 is greedy).
    """

    sources: tuple[TaskSource, ...] = ()
    every_batches: int = 0
    samples: int = 1
    temperature: float = 0.0

    def __post_init__(self):
        for name, least in (("every_batches", 0), ("samples", 1), ("temperature", 0)):
            value = getattr(self, name)
            configlib.check_field(value >= least, f"evaluation.{name}", value, f"at least {least}")
        fits = self.every_batches == 0 or bool(self.sources)
        configlib.check_field(
            fits, "evaluation.sources", self.sources, "a source, as every_batches is not 0"
        )


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """One run of reinforcement learning.

    checkpoint: a release directory or a converted one. tokenizer: empty takes the checkpoint's.
    batches: generation batches in all. sources, curriculum: of tasks; without a curriculum all
    sources weigh the same. pass_rates: leaves tasks out that are too easy or too hard.
    length_bias: watches a judge that likes long answers. rewards: with an agent, on top of what
    its environment gives.
    mesh: of the trainer; serving_mesh: the same devices for the sampler; both (axis, devices)
    pairs, empty is fsdp over all devices, and for the sampler expert over all.
    pearson_min: of sampler and trainer probabilities, below which a batch raises the alarm.
    """

    checkpoint: str
    batches: int
    sources: tuple[TaskSource, ...]
    rollout: RolloutConfig
    update: UpdateConfig
    rewards: RewardsConfig | None = None
    objective: Objective = PRESETS["cispo"]
    agent: AgentConfig | None = None
    curriculum: CurriculumConfig | None = None
    pass_rates: PassRateConfig | None = None
    length_bias: LengthBiasConfig | None = None
    tokenizer: str = ""
    dtype: str = "bfloat16"
    remat: str = ""
    lora: LoraConfig | None = None
    mesh: tuple[tuple[str, int], ...] = ()
    serving_mesh: tuple[tuple[str, int], ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: RlEvaluationConfig = RlEvaluationConfig()
    pearson_min: float = 0.99
    save: SaveConfig = SaveConfig(every_steps=1)
    log: LogConfig = LogConfig(every_steps=1)
    seed: int = 0
    compilation_cache: str = ""

    def __post_init__(self):
        configlib.check_field(self.batches >= 1, "batches", self.batches, "at least 1")
        configlib.check_field(bool(self.sources), "sources", self.sources, "at least one")
        wanted = "some, as there is no agent whose environment gives them"
        configlib.check_field(bool(self.rewards or self.agent), "rewards", self.rewards, wanted)
        configlib.check_field(bool(self.checkpoint), "checkpoint", self.checkpoint, "a directory")
        configlib.check_field(
            self.dtype in ("bfloat16", "float32"), "dtype", self.dtype, "bfloat16 or float32"
        )
        wanted = ("", *model_config.REMAT_POLICIES)
        configlib.check_field(self.remat in wanted, "remat", self.remat, f"one of {wanted}")
        names = [source.name for source in self.sources]
        configlib.check_field(len(set(names)) == len(names), "sources", names, "different names")
        if self.rewards is not None:
            known = {name for name, _ in self.rewards.sources}
            every = {one.name for one in (*self.sources, *self.evaluation.sources)}
            left = [] if compose.ANY_SOURCE in known else sorted(every - known)
            wanted = f"rewards for every source of tasks, or for {compose.ANY_SOURCE!r}"
            configlib.check_field(
                not left, "rewards.sources", f"none for {', '.join(left)}", wanted
            )
        groups, number = self.rollout.groups, self.update.minibatches
        wanted = f"a divisor of rollout.groups = {groups}, as groups stay whole"
        configlib.check_field(groups % number == 0, "update.minibatches", number, wanted)
        fits = self.update.row_tokens in (
            0,
            max(self.update.row_tokens, self.rollout.max_sample_tokens),
        )
        wanted = f"0, or at least {self.rollout.max_sample_tokens}, the longest sample"
        configlib.check_field(fits, "update.row_tokens", self.update.row_tokens, wanted)
        unknown = set(self.curriculum.sources) - set(names) if self.curriculum else set()
        configlib.check_field(not unknown, "curriculum", sorted(unknown), f"sources of {names}")
        partial = not (self.agent and self.rollout.partial_tokens)
        got = self.rollout.partial_tokens
        configlib.check_field(
            partial, "rollout.partial_tokens", got, "0 with an agent: its world cannot wait"
        )

    def task_curriculum(self) -> CurriculumConfig:
        """Return the curriculum, or one of equal weights."""
        if self.curriculum is not None:
            return self.curriculum
        weights = tuple((source.name, 1.0) for source in self.sources)
        return CurriculumConfig(weights=((0, weights),), seed=self.seed)
