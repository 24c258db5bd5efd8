"""Schemas of training runs: what a file in `configs/` returns."""

import dataclasses
import math

from m1_jax import config as config_lib
from m1_jax import configlib
from train import lora as lora_lib
from train.data import config as data_config

# A config file imports this module alone.
DataConfig = data_config.DataConfig
DataSource = data_config.DataSource
LoraConfig = lora_lib.LoraConfig

SCHEDULE_SHAPES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class TrainStage:
    """Training at one length on one mesh.

    seq_len: tokens in a row. rows: in a global batch. tokens: of the stage, padding counted as it
    is computed too; rounded up to whole batches. learning_rate: at the stage's end, reached from
    the stage before it (0 for the first) by `shape`: "constant" is there from the start, after a
    linear `warmup_tokens`. mesh: (axis, devices) pairs, one of them may be -1; empty is fsdp over
    all devices. accumulate: microbatches in a batch.
    """

    seq_len: int
    rows: int
    tokens: int
    learning_rate: float
    shape: str = "constant"
    warmup_tokens: int = 0
    mesh: tuple[tuple[str, int], ...] = ()
    accumulate: int = 1

    def __post_init__(self):
        for name in ("seq_len", "rows", "tokens", "accumulate"):
            configlib.check_field(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        configlib.check_field(
            self.learning_rate >= 0, "learning_rate", self.learning_rate, "at least 0"
        )
        configlib.check_field(
            self.shape in SCHEDULE_SHAPES,
            "shape",
            self.shape,
            f"one of {', '.join(SCHEDULE_SHAPES)}",
        )
        fits = 0 <= self.warmup_tokens <= self.tokens
        configlib.check_field(
            fits, "warmup_tokens", self.warmup_tokens, f"0 to tokens = {self.tokens}"
        )
        wanted = f"a divisor of rows = {self.rows}"
        configlib.check_field(
            self.rows % self.accumulate == 0, "accumulate", self.accumulate, wanted
        )

    @property
    def num_steps(self) -> int:
        return math.ceil(self.tokens / (self.rows * self.seq_len))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; see `optim.AdamW`. M1 trains with eps 1e-15."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Coefficients beside the tokens' loss.

    balance: of the routers' balance loss, as (token, coefficient) points joined by lines; empty
    takes the model's own. z: of the squared log normalizer.
    """

    balance: tuple[tuple[int, float], ...] = ()
    z: float = 0.0

    def __post_init__(self):
        tokens = [token for token, _ in self.balance]
        configlib.check_field(
            tokens == sorted(set(tokens)), "loss.balance", tokens, "rising tokens"
        )
        configlib.check_field(self.z >= 0, "loss.z", self.z, "at least 0")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss. every_steps: 0 never. batches: of each evaluation; 0 for all there are."""

    sources: tuple[DataSource, ...] = ()
    every_steps: int = 0
    batches: int = 8

    def __post_init__(self):
        fits = self.every_steps == 0 or bool(self.sources)
        configlib.check_field(
            fits, "evaluation.sources", self.sources, "a source, as every_steps is not 0"
        )


@dataclasses.dataclass(frozen=True)
class SaveConfig:
    """Checkpoints.

    keep: how many of the newest. keep_every: steps of those kept for ever, or 0. directory: where
    they lie, such as gs://BUCKET/RUN; every process must reach it. Empty is below the workdir.
    """

    every_steps: int = 1000
    keep: int = 2
    keep_every: int = 0
    directory: str = ""

    def __post_init__(self):
        configlib.check_field(
            self.every_steps >= 1, "save.every_steps", self.every_steps, "at least 1"
        )
        configlib.check_field(self.keep >= 1, "save.keep", self.keep, "at least 1")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """every_steps: between metrics. samples: whether samples.jsonl lists what every step read
    (with several processes, in the rows of the first).

    spike: a loss that exceeds the median of the last 100 by this factor is reported.
    trace: (first step, how many) to record for xprof.
    """

    every_steps: int = 10
    samples: bool = False
    spike: float = 1.5
    trace: tuple[int, int] | None = None

    def __post_init__(self):
        configlib.check_field(
            self.every_steps >= 1, "log.every_steps", self.every_steps, "at least 1"
        )
        configlib.check_field(self.spike > 1, "log.spike", self.spike, "more than 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    checkpoint: a release directory or a converted one to start from; or else `model`, whose
    weights are drawn from `seed`. tokenizer: its directory; empty takes the checkpoint's.
    dtype: of the computation; master weights and moments are float32. remat: see `ModelConfig`;
    empty leaves the model's. lora: trains adapters of low rank instead of the weights, which then
    have `dtype`. max_skipped: steps in a row without a finite gradient before the run
    stops. compilation_cache: directory; empty is ~/.cache/m1_jax.
    """

    stages: tuple[TrainStage, ...]
    data: DataConfig
    checkpoint: str = ""
    model: config_lib.ModelConfig | None = None
    tokenizer: str = ""
    dtype: str = "bfloat16"
    remat: str = ""
    lora: LoraConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()
    seed: int = 0
    skip_nonfinite: bool = True
    max_skipped: int = 10
    compilation_cache: str = ""

    def __post_init__(self):
        configlib.check_field(len(self.stages) > 0, "stages", self.stages, "at least one")
        either = bool(self.checkpoint) != (self.model is not None)
        configlib.check_field(
            either, "checkpoint", self.checkpoint, "either this or a model, not both"
        )
        configlib.check_field(
            bool(self.checkpoint or self.tokenizer), "tokenizer", "", "its directory"
        )
        configlib.check_field(
            self.dtype in ("bfloat16", "float32"), "dtype", self.dtype, "bfloat16 or float32"
        )
        frozen = self.lora is None or bool(self.checkpoint)
        configlib.check_field(
            frozen, "lora", self.lora, "a checkpoint, as random weights would stay random"
        )
        wanted = ("", *config_lib.REMAT_POLICIES)
        configlib.check_field(self.remat in wanted, "remat", self.remat, f"one of {wanted}")
        configlib.check_field(self.max_skipped >= 1, "max_skipped", self.max_skipped, "at least 1")
