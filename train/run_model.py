"""The model that a run trains: its config, tokenizer, dtypes, first weights and adapters.

Pretraining, fine-tuning and reinforcement learning build it alike: `train.loop` and
`train.rl.loop` both take their states from a `RunModel`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from m1_jax import config as model_config_lib
from m1_jax import distributed, local_path, multihost, sharding
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax import tokenizer as tokenizer_lib
from m1_jax.checkpoints import checkpoint_dir
from m1_jax.checkpoints import load as load_lib
from train import base_digest, checkpoints, optim, resume
from train import lora as lora_lib
from train import step as step_lib


class ModelFields(Protocol):
    """The fields of `TrainConfig` and `RlConfig` that decide the model of a run."""

    # A protocol, as the two classes share no base class.
    # Properties, because a plain attribute of a protocol would have to be writable.
    @property
    def checkpoint(self) -> str: ...
    @property
    def tokenizer(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def remat(self) -> str: ...
    @property
    def lightning(self) -> str: ...
    @property
    def lora(self) -> lora_lib.LoraConfig | None: ...
    @property
    def seed(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class RunModel:
    """How to make the model of a run, on any mesh.

    Attributes:
      config: the model's config, with the run's choices of rematerialisation and lightning.
      tokenizer: all of its ids lie in the model's vocabulary.
      checkpoint: directory of the first weights. Empty draws weights from `seed`.
      dtype: dtype of the computation.
      lora: adapters to train. None trains the weights themselves.
      seed: seed of random weights and of adapters.
    """

    config: model_config_lib.ModelConfig
    tokenizer: tokenizer_lib.Tokenizer
    checkpoint: str
    dtype: jnp.dtype
    lora: lora_lib.LoraConfig | None
    seed: int

    @property
    def param_dtype(self) -> jnp.dtype:
        """Return the dtype of the parameters: float32, or with LoRA that of the computation.

        With LoRA the weights are frozen, so rounding them once loses nothing more.
        `lora.add_adapters` makes the adapters float32 itself.
        """
        return jnp.dtype(jnp.float32) if self.lora is None else self.dtype

    def initial_model(self, layout: sharding.MeshLayout | None) -> model_lib.MiniMaxM1:
        """Return the model before its first step, with its adapters."""
        # Without a checkpoint there are no adapters: `TrainConfig` refuses LoRA on random weights.
        if not self.checkpoint:
            key = jax.random.key(self.seed)
            return params_lib.random_model(self.config, key, self.dtype, self.param_dtype, layout)
        return self._add_adapters(self.load_weights(layout, self.param_dtype))

    def load_weights(
        self, layout: sharding.MeshLayout | None, param_dtype: jnp.dtype
    ) -> model_lib.MiniMaxM1:
        """Return the checkpoint's model, without adapters."""
        mesh = None if layout is None else layout.mesh
        model = load_lib.load(
            self.checkpoint,
            self.dtype,
            mesh,
            param_dtype=param_dtype,
            lightning=self.config.lightning_implementation,
        )
        # `load` reads the checkpoint's own config, which does not know the run's `remat`.
        model.config = self.config
        return model

    def abstract_model(self, layout: sharding.MeshLayout | None) -> model_lib.MiniMaxM1:
        """Return the model as shapes and shardings, and its small adapters as arrays."""
        return self._add_adapters(
            params_lib.abstract_model(self.config, self.dtype, self.param_dtype, layout)
        )

    def init_state(
        self, layout: sharding.MeshLayout | None, optimizer: optim.AdamW
    ) -> step_lib.TrainState:
        """Return the state before the first step."""
        return step_lib.init_state(self.initial_model(layout), optimizer)

    def open_state(
        self,
        position: resume.RunPosition,
        store: checkpoints.CheckpointStore,
        layout: sharding.MeshLayout | None,
        optimizer: optim.AdamW,
    ) -> step_lib.TrainState:
        """Return the state that a run begins or goes on with.

        Raises:
          ResumeError: see `CheckpointStore.restore`.
        """
        if position.info is not None:
            return self.restore_state(store, position.step, layout, optimizer)
        first = position.first_weights
        if first is None:
            return self.init_state(layout, optimizer)
        with checkpoints.CheckpointStore(
            pathlib.Path(first.directory), first.save, store.base_digest, read_only=True
        ) as other_store:
            state = self.restore_state(other_store, first.step, layout, optimizer)
        if first.with_moments:
            return dataclasses.replace(state, step=jnp.zeros_like(state.step))
        model = state.model
        del state  # the old moments go before new ones are made
        return step_lib.init_state(model, optimizer)

    def abstract_state(
        self, layout: sharding.MeshLayout | None, optimizer: optim.AdamW
    ) -> step_lib.TrainState:
        """Return a state of shapes and shardings on a mesh."""
        return step_lib.abstract_state(self.abstract_model(layout), optimizer)

    def restore_state(
        self,
        store: checkpoints.CheckpointStore,
        step: int,
        layout: sharding.MeshLayout | None,
        optimizer: optim.AdamW,
    ) -> step_lib.TrainState:
        """Return the state of a checkpoint, on any mesh.

        Raises:
          ResumeError: see `CheckpointStore.restore`.
        """
        # Only shapes and shardings, so that the model is not in memory twice.
        like = self.abstract_state(layout, optimizer)
        if self.lora is not None:
            # A checkpoint holds trained parameters alone. Frozen ones are those of the beginning.
            like = dataclasses.replace(like, model=self.initial_model(layout))
        return store.restore(step, like)

    def _add_adapters(self, model: model_lib.MiniMaxM1) -> model_lib.MiniMaxM1:
        if self.lora is None:
            return model
        # From the seed alone: every process, and every start of a run, draws the same adapters.
        return lora_lib.add_adapters(model, self.lora, jax.random.key(self.seed))


def make_run_model(
    config: ModelFields, model_config: model_config_lib.ModelConfig | None = None
) -> RunModel:
    """Return the model of a run. It reads no weights.

    Args:
      config: the run's config.
      model_config: config of a model that begins with random weights. None takes the
        checkpoint's.

    Raises:
      PathError: the checkpoint or the tokenizer lies in a bucket.
      CheckpointError: there is no checkpoint.
      ConfigError: this model cannot compute what config.json says.
      ValueError: the tokenizer has ids outside of the model's vocabulary.
    """
    checkpoint, tokenizer_dir = (
        str(local_path.resolve_path(path, name)) if path else ""
        for name, path in (("checkpoint", config.checkpoint), ("tokenizer", config.tokenizer))
    )
    if model_config is None:
        model_config = _read_model_config(checkpoint)
    model_config = apply_run_choices(config, model_config)
    tokenizer = tokenizer_lib.Tokenizer.load(tokenizer_dir or checkpoint)
    check_tokenizer(tokenizer, model_config)
    return RunModel(
        config=model_config,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        dtype=jnp.dtype(config.dtype),
        lora=config.lora,
        seed=config.seed,
    )


def apply_run_choices(
    config: ModelFields, model_config: model_config_lib.ModelConfig
) -> model_config_lib.ModelConfig:
    """Return the model's config with what a run says of it."""
    if config.remat:
        model_config = dataclasses.replace(model_config, remat=config.remat)
    if config.lightning:
        model_config = dataclasses.replace(model_config, lightning_implementation=config.lightning)
    return model_config


def digest_base(model: RunModel, has_reference: bool = False) -> str:
    """Return a digest of the checkpoint's weights where a run uses them to its end, else "".

    All processes call this, and process 0 reads.

    Args:
      model: the run's model.
      has_reference: whether the run compares with the checkpoint's model.
    """
    if model.lora is None and not has_reference:
        return ""
    digest = distributed.run_on_first(
        lambda: base_digest.digest_weights(pathlib.Path(model.checkpoint))
    )
    return multihost.broadcast_object(digest)


def open_store(
    start: resume.RunStart, model: RunModel, has_reference: bool = False
) -> checkpoints.CheckpointStore:
    """Return the checkpoints of a run. All processes call this. The arguments: `digest_base`."""
    digest = digest_base(model, has_reference)
    return checkpoints.CheckpointStore(start.workdir, start.config.save, digest)


def check_tokenizer(
    tokenizer: tokenizer_lib.Tokenizer, model_config: model_config_lib.ModelConfig
) -> None:
    """Refuse a tokenizer with ids outside of the model's vocabulary.

    Raises:
      ValueError: there are such ids.
    """
    # A larger vocabulary is fine: a model may pad its own.
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"tokenizer: its ids reach {tokenizer.vocab_size - 1}, but the model's vocabulary ends "
            f"at {model_config.vocab_size - 1}. Is it the tokenizer of another model?"
        )


def make_train_mesh(
    axes: Mapping[str, int], devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh | None:
    """Return a trainer's mesh: fsdp over all devices by default, None for a single device.

    Devices other than this process's own are those of a topology, see `train.rehearse`.
    """
    num_devices = jax.device_count() if devices is None else len(devices)
    if not axes and num_devices == 1:
        return None
    return sharding.make_mesh(axes or {"fsdp": -1}, devices)


def _read_model_config(checkpoint: str) -> model_config_lib.ModelConfig:
    directory = checkpoint_dir.require_checkpoint(checkpoint)
    return model_config_lib.ModelConfig.from_file(directory / checkpoint_dir.CONFIG_FILE)
