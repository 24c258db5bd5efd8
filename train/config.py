"""Schemas of training runs: what a file in `configs/` returns."""

import dataclasses
import math

from m1_jax import config as config_lib
from m1_jax import configlib
from train import lora as lora_lib
from train.data import config as data_config

# A config file imports this module alone, so the classes of its fields stand here as well.
DataConfig = data_config.DataConfig
DataSource = data_config.DataSource
LoraConfig = lora_lib.LoraConfig

# See `TrainStage.shape`.
SCHEDULE_SHAPES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class TrainStage:
    """Training at one length on one mesh.

    Attributes:
      seq_len: T, tokens in a row, at least 2.
      rows: rows in a global batch, at least 1.
      tokens: length of the stage, rounded up to whole batches. Padding counts, because it is
        computed, too.
      learning_rate: rate at the stage's end, at least 0.
      shape: curve to that rate from the rate at the end of the stage before, or from 0 in the
        first stage: "linear" or "cosine". "constant" has the end's rate from the beginning.
      warmup_tokens: tokens over which the rate is also multiplied by a linear rise from 0 to 1.
        It is 0 to `tokens`.
      mesh: (axis, devices) pairs, of which one number may be -1 for all devices that remain. Empty
        is fsdp over all devices.
      accumulate: microbatches in a batch, whose gradients are added. It divides `rows`.
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
        # Equal microbatches, so that one compiled program serves all of them.
        divisor = f"a divisor of rows = {self.rows}"
        configlib.check_field(
            self.rows % self.accumulate == 0, "accumulate", self.accumulate, divisor
        )

    @property
    def num_steps(self) -> int:
        """Return the number of batches in the stage."""
        # Whole batches: the last one may pass the stage's tokens.
        return math.ceil(self.tokens / (self.rows * self.seq_len))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, see `optim.AdamW`. The defaults are those of M1 where its report names them.

    Attributes:
      b1: decay of the first moment, from 0 to less than 1.
      b2: decay of the second moment, from 0 to less than 1.
      eps: added to the root of the second moment, above 0. M1 trains with 1e-15, because many of
        its gradients are far below the usual 1e-8.
      weight_decay: decay of matrices, at least 0. Vectors are never decayed.
      clip_norm: largest global norm of a gradient, above 0. None clips nothing.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Coefficients of the losses beside the tokens' own.

    Attributes:
      balance: coefficient of the routers' balance loss, as (token of the run, coefficient) points
        in rising order, joined by lines. Empty takes the model's own coefficient.
      z: coefficient of the squared log normalizer of the logits (z-loss), at least 0.
    """

    balance: tuple[tuple[int, float], ...] = ()
    z: float = 0.0

    def __post_init__(self):
        # `jnp.interp` wants rising points, and gives nonsense silently otherwise.
        tokens = [token for token, _ in self.balance]
        configlib.check_field(
            tokens == sorted(set(tokens)), "loss.balance", tokens, "rising tokens"
        )
        configlib.check_field(self.z >= 0, "loss.z", self.z, "at least 0")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss.

    Attributes:
      sources: held-out data, at least one where `every_steps` is not 0.
      every_steps: steps between evaluations. The last step of a stage has one, too. 0 is never.
      batches: batches of an evaluation, always the same ones. 0 takes all that there are.
    """

    sources: tuple[DataSource, ...] = ()
    every_steps: int = 0
    batches: int = 8

    def __post_init__(self):
        for name in ("every_steps", "batches"):
            value = getattr(self, name)
            configlib.check_field(value >= 0, f"evaluation.{name}", value, "at least 0")
        fits = self.every_steps == 0 or bool(self.sources)
        configlib.check_field(
            fits, "evaluation.sources", self.sources, "a source, as every_steps is not 0"
        )


@dataclasses.dataclass(frozen=True)
class SaveConfig:
    """Checkpoints.

    Attributes:
      every_steps: steps between checkpoints, at least 1. The end of a stage and a stop by a signal
        have one, too.
      keep: number of the newest checkpoints that stay, at least 1. There must be room for one
        more, as the oldest goes once the newest is written.
      keep_every: checkpoints at multiples of this number of steps stay for ever. 0 is none.
      directory: where the checkpoints lie, such as gs://BUCKET/RUN. Every process must reach it.
        Empty is below the run's directory.
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
        configlib.check_field(
            self.keep_every >= 0, "save.keep_every", self.keep_every, "at least 0"
        )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Metrics and traces.

    Attributes:
      every_steps: steps between metrics, at least 1.
      samples: whether samples.jsonl lists the documents of every step. With several processes it
        lists those in the rows of the first process.
      spike: a loss is reported where it exceeds the median of the last 100 by this factor, which
        is more than 1.
      trace: (first step, number of steps) to record for xprof. None records nothing.
    """

    every_steps: int = 10
    samples: bool = False
    spike: float = 1.5
    trace: tuple[int, int] | None = None

    def __post_init__(self):
        configlib.check_field(
            self.every_steps >= 1, "log.every_steps", self.every_steps, "at least 1"
        )
        # At 1 or less every other loss would be a spike.
        configlib.check_field(self.spike > 1, "log.spike", self.spike, "more than 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
      stages: what to train, one after the other, at least one.
      data: what to read.
      checkpoint: a release directory or a converted one to start from. Either this or `model`.
      model: shapes of a model whose weights are drawn from `seed`.
      tokenizer: directory of the tokenizer. Empty takes the checkpoint's.
      dtype: dtype of the computation, "bfloat16" or "float32". Master weights and moments are
        float32.
      remat: what is computed again in the backward pass, see `ModelConfig`. Empty leaves the
        model's choice.
      lightning: implementation of lightning attention, see `ModelConfig`. Empty leaves the model's
        choice, which for a checkpoint is the kernels where they run.
      lora: trains adapters of low rank, beside frozen weights in `dtype`. None trains the weights.
      optimizer: the optimizer.
      loss: coefficients of the losses beside the tokens' own.
      evaluation: held-out loss.
      save: checkpoints.
      log: metrics and traces.
      seed: seed of the order of documents, of random weights, and of adapters.
      skip_nonfinite: whether a step without a finite gradient changes nothing. False takes it.
      max_skipped: steps in a row without a finite gradient, or without a token to learn, after
        which the run stops, at least 1. The latter change nothing, whatever `skip_nonfinite` is.
      compilation_cache: directory of compiled programs. Empty is ~/.cache/m1_jax/xla.
    """

    stages: tuple[TrainStage, ...]
    data: DataConfig
    checkpoint: str = ""
    model: config_lib.ModelConfig | None = None
    tokenizer: str = ""
    dtype: str = "bfloat16"
    remat: str = ""
    lightning: str = ""
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
        # A checkpoint brings its model's shapes, so stating both could only contradict.
        has_one_model = bool(self.checkpoint) != (self.model is not None)
        configlib.check_field(
            has_one_model, "checkpoint", self.checkpoint, "either this or a model, not both"
        )
        configlib.check_field(
            bool(self.checkpoint or self.tokenizer), "tokenizer", "", "its directory"
        )
        configlib.check_field(
            self.dtype in ("bfloat16", "float32"), "dtype", self.dtype, "bfloat16 or float32"
        )
        # Random weights would be frozen, and so stay random.
        is_trained = self.lora is None or bool(self.checkpoint)
        configlib.check_field(
            is_trained,
            "lora",
            self.lora,
            "a checkpoint, as random weights would stay random",
        )
        policies = ("", *config_lib.REMAT_POLICIES)
        configlib.check_field(self.remat in policies, "remat", self.remat, f"one of {policies}")
        implementations = ("", *config_lib.LIGHTNING_IMPLEMENTATIONS)
        configlib.check_field(
            self.lightning in implementations,
            "lightning",
            self.lightning,
            f"one of {implementations}",
        )
        configlib.check_field(self.max_skipped >= 1, "max_skipped", self.max_skipped, "at least 1")
