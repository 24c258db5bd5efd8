"""What a plan is made for: the command's config, and the model that it names."""

import dataclasses

from m1_jax import config as config_lib
from m1_jax import local_path, quantize
from m1_jax.plan import jobs

MODEL_PRESETS = {"m1": config_lib.ModelConfig.m1, "tiny": config_lib.ModelConfig.tiny}
LIGHTNING_CHOICES = (None, "chunked", "tpu")
AUTO_REMAT = "auto"
COLOCATED_JOBS = ("rl_update", "reshard")  # a sampler lies on the trainer's devices, too


class PlanError(ValueError):
    """A plan that cannot be made. The message says what to change."""


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What to compile, and for what.

    Attributes:
      topology: a slice, like v5p:8x8x8.
      job: train (a whole optimizer step), prefill (seq tokens into an empty state), decode (one
        token each, with room for seq in the cache), serve (the engine's decoding of batch
        requests of seq tokens), rl_update (the programs of an RL update, for microbatches of batch
        rows), reshard (the copy of a trainer's weights for the sampler on the same devices).
      config: m1, tiny, a config.json or a directory that holds one.
      mesh: axis=size, comma separated. Empty: search, compiling at most `tries` meshes.
      serving_mesh: the sampler's mesh, in the form of `mesh`. In rl_update and reshard only.
      seq: tokens a row.
      batch: rows of all chips. 0: 4,096 tokens a chip in training, else one row a chip.
      slices: number of slices.
      accumulate: microbatches of a training step.
      remat: what training computes again, as in `ModelConfig`, or auto: the fastest that fits, for
        the job train alone.
      lightning: chunked (XLA) or tpu (the Pallas kernels). None: as a run chooses, which is the
        kernels where the shapes fit.
      weights: None (bfloat16) or, where nothing is trained, one of `quantize.INT8_RECIPES`.
      tries: meshes that a search compiles at most.
      json: file for the record. Empty: none is written.
    """

    topology: str
    job: str
    config: str = "m1"
    mesh: str = ""
    serving_mesh: str = ""
    seq: int = 4096
    batch: int = 0
    slices: int = 1
    accumulate: int = 1
    remat: str = "layer"
    lightning: str | None = None
    weights: str | None = None
    tries: int = 3
    json: str = ""

    def __post_init__(self):
        if self.job not in jobs.JOB_TRACERS:
            raise PlanError(f"job: got {self.job!r}; wanted one of {', '.join(jobs.JOB_TRACERS)}")
        if (self.job in COLOCATED_JOBS) != bool(self.serving_mesh):
            raise PlanError(
                f"serving_mesh: got {self.serving_mesh!r} for the job {self.job}; wanted "
                f"axis=size,... of the sampler for {' and '.join(COLOCATED_JOBS)}, and for no other"
            )
        if self.job == "reshard" and not self.mesh:
            raise PlanError("mesh: got none; wanted axis=size,... of the trainer, for reshard")
        if self.job == "rl_update" and self.accumulate != 1:
            raise PlanError(
                f"accumulate: got {self.accumulate}; wanted 1 for rl_update, which runs the "
                "same program for every microbatch: give the rows of one microbatch as --batch"
            )
        if min(self.seq, self.accumulate, self.tries) < 1 or self.batch < 0:
            raise PlanError(
                f"got seq {self.seq}, batch {self.batch}, accumulate {self.accumulate}, tries "
                f"{self.tries}; wanted at least 1 of each, or 0 for batch"
            )
        remat_policies = (*config_lib.REMAT_POLICIES, *[AUTO_REMAT] * (self.job == "train"))
        if self.remat not in remat_policies:
            raise PlanError(
                f"remat: got {self.remat!r} for the job {self.job}; wanted one of "
                f"{', '.join(remat_policies)}"
            )
        quantize.check_recipe(self.weights)
        if self.job in ("train", *COLOCATED_JOBS) and self.weights is not None:
            raise PlanError(f"weights: {self.weights} cannot be trained; leave --weights out")
        if self.lightning not in LIGHTNING_CHOICES:
            raise PlanError(f"lightning: got {self.lightning!r}; wanted chunked or tpu")


def read_model_config(config: PlanConfig) -> config_lib.ModelConfig:
    """Return the model's config, with the rematerialisation and kernels of the plan.

    Raises:
      PlanError: no preset and no file has the name.
      ConfigError: a file that is no config of this model.
    """
    if config.config in MODEL_PRESETS:
        model_config = MODEL_PRESETS[config.config]()
    else:
        path = local_path.resolve_path(config.config, "--config")
        if not path.exists():
            raise PlanError(
                f"config: got {config.config!r}; wanted {' or '.join(MODEL_PRESETS)}, a "
                "config.json or the directory of one"
            )
        file = path / "config.json" if path.is_dir() else path
        model_config = config_lib.ModelConfig.from_file(file)
    # Without a backward pass nothing is saved, so there is nothing to compute again.
    remat = config.remat if config.job in ("train", "rl_update") else "none"
    return dataclasses.replace(model_config, remat=remat, lightning_implementation=config.lightning)
