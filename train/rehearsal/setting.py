"""What is rehearsed: a config on the devices of a slice, with stand-ins for what is not here."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from m1_jax import config as model_config_lib
from m1_jax import configlib, local_path
from m1_jax import tokenizer as tokenizer_lib
from m1_jax.plan import config as plan_config
from m1_jax.plan import topology
from train import config as config_lib
from train import run_model
from train.rehearsal import findings as findings_lib
from train.rl import config as rl_config


@dataclasses.dataclass(frozen=True)
class RehearsalConfig:
    """What to rehearse. The fields are the flags of the command.

    Attributes:
      config: spec of the config file, FILE or FILE:ARG.
      topology: a slice, like v5p:8x8x8, or several, like "8 x v5e:16x16". Empty is one device.
      set: overrides of the config, FIELD=VALUE.
      model: shapes where the checkpoint is not on this machine: m1, tiny, a config.json or the
        directory of one.
      steps: steps of the data streams, over all stages. Half of a stage's are its first and half
        its last.
      document_tokens: mean length of the documents that stand in for files that are not here. 0
        takes 1,000 tokens, or a sixteenth of the longest row if that is more.
      plans: directory of the records of m1-plan. Empty is ~/.cache/m1_jax/plans.
      compile: whether to run m1-plan for programs without a record. It takes minutes for each.
      workers: processes that run lanes. 0 is one for each core.
    """

    config: str
    topology: str = ""
    set: tuple[str, ...] = ()
    model: str = "m1"
    steps: int = 2000
    document_tokens: int = 0
    plans: str = ""
    compile: bool = False
    workers: int = 0

    def __post_init__(self):
        configlib.check_field(self.steps >= 1, "steps", self.steps, "at least 1")
        configlib.check_field(
            self.document_tokens >= 0, "document_tokens", self.document_tokens, "at least 0"
        )
        configlib.check_field(self.workers >= 0, "workers", self.workers, "at least 0")

    @property
    def plans_directory(self) -> pathlib.Path:
        default = pathlib.Path.home() / ".cache" / "m1_jax" / "plans"
        return local_path.resolve_path(self.plans, "--plans") if self.plans else default


@dataclasses.dataclass(frozen=True)
class RehearsalSetting:
    """A run's config, and where it would run.

    Attributes:
      rehearsal: the flags.
      run_config: config of the run.
      tpu_slice: the slice. None is a single device.
      devices: all devices of the run, in the order of the topology.
      model: the run's model, without weights.
      has_tokenizer: whether `model.tokenizer` is the run's own.
    """

    rehearsal: RehearsalConfig
    run_config: config_lib.TrainConfig | rl_config.RlConfig
    tpu_slice: topology.TpuSlice | None
    devices: Sequence[Any]
    model: run_model.RunModel
    has_tokenizer: bool

    @property
    def num_hosts(self) -> int:
        return len({device.process_index for device in self.devices})

    @property
    def has_unsized_adapters(self) -> bool:
        """Return whether the run trains adapters on devices that are not here.

        Adapters are drawn, not only described, and m1-plan has no job that trains them.
        """
        return self.run_config.lora is not None and self.tpu_slice is not None

    @property
    def place_name(self) -> str:
        """Return the slice, its chips and hosts, for the page."""
        if self.tpu_slice is None:
            return "one device"
        slices = f"{self.tpu_slice.num_slices} x " if self.tpu_slice.num_slices > 1 else ""
        return (
            f"{slices}{self.tpu_slice.name}: {self.tpu_slice.num_chips:,} chips, "
            f"{self.num_hosts:,} hosts"
        )


def parse_slices(name: str) -> topology.TpuSlice | None:
    """Read a slice like v5p:8x8x8, several like "8 x v5e:16x16", or nothing.

    Raises:
      TopologyError: a name of another form, or a slice larger than there are.
    """
    if not name:
        return None
    several = re.fullmatch(r"\s*(\d+)\s*x\s+(\S+)\s*", name)
    return (
        topology.parse_slice(several[2], int(several[1]))
        if several
        else (topology.parse_slice(name.strip()))
    )


def open_setting(
    rehearsal: RehearsalConfig, findings: findings_lib.FindingList
) -> RehearsalSetting:
    """Return the setting of a rehearsal. What is not on this machine is replaced, and noted.

    Raises:
      ValueError: a config or slice that does not exist, or parts that do not fit together.
    """
    run_config = configlib.load_config(rehearsal.config, rehearsal.set)
    if not isinstance(run_config, config_lib.TrainConfig | rl_config.RlConfig):
        raise ValueError(
            f"config: got a {type(run_config).__name__} of {rehearsal.config}; wanted the config "
            "of a run, as m1-pretrain, m1-sft and m1-rl take it"
        )
    tpu_slice = parse_slices(rehearsal.topology)
    devices = jax.devices()[:1] if tpu_slice is None else topology.get_slice_devices(tpu_slice)
    model_config = _read_model_config(rehearsal, run_config, findings)
    model_config = run_model.apply_run_choices(run_config, model_config)
    tokenizer = _load_tokenizer(run_config, findings)
    if tokenizer is not None:
        run_model.check_tokenizer(tokenizer, model_config)
    model = run_model.RunModel(
        config=model_config,
        # A stand-in's ids lie in any vocabulary, see `documents.StandInTokenizer`.
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        checkpoint=run_config.checkpoint,
        dtype=jnp.dtype(run_config.dtype),
        lora=run_config.lora,
        seed=run_config.seed,
    )
    return RehearsalSetting(rehearsal, run_config, tpu_slice, devices, model, tokenizer is not None)


def _read_model_config(
    rehearsal: RehearsalConfig,
    run_config: config_lib.TrainConfig | rl_config.RlConfig,
    findings: findings_lib.FindingList,
) -> model_config_lib.ModelConfig:
    if isinstance(run_config, config_lib.TrainConfig) and run_config.model is not None:
        return run_config.model
    path = find_file(run_config.checkpoint, "config.json")
    if path is not None:
        return model_config_lib.ModelConfig.from_file(path)
    if rehearsal.model in plan_config.MODEL_PRESETS:
        model_config = plan_config.MODEL_PRESETS[rehearsal.model]()
    else:
        path = local_path.resolve_path(rehearsal.model, "--model")
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(
                f"model: got {rehearsal.model!r}; wanted "
                f"{' or '.join(plan_config.MODEL_PRESETS)}, a config.json or the directory of one"
            )
        model_config = model_config_lib.ModelConfig.from_file(file)
    findings.add(
        "assumes",
        "model",
        f"the checkpoint {run_config.checkpoint} is not here: the shapes are those of "
        f"--model={rehearsal.model}",
    )
    return model_config


def find_file(directory: str, name: str) -> pathlib.Path | None:
    """Return a file of a run's checkpoint or tokenizer, None where it is not on this machine."""
    file = local_path.resolve_path(directory, "checkpoint") / name if directory else None
    return file if file is not None and file.is_file() else None


def _load_tokenizer(
    run_config: config_lib.TrainConfig | rl_config.RlConfig, findings: findings_lib.FindingList
) -> tokenizer_lib.Tokenizer | None:
    directory = run_config.tokenizer or run_config.checkpoint
    if find_file(directory, "tokenizer.json") is not None:
        return tokenizer_lib.Tokenizer.load(directory)
    findings.add(
        "assumes",
        "tokenizer",
        f"the tokenizer {directory} is not here: it was not checked against the vocabulary",
    )
    return None
