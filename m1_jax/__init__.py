"""MiniMax-M1 in JAX: `load` a checkpoint, call the model, extend sequences, `save` it again."""

from m1_jax.checkpoints.load import load
from m1_jax.checkpoints.save import save
from m1_jax.config import ModelConfig
from m1_jax.model import MiniMaxM1
from m1_jax.version import VERSION as __version__

__all__ = ["MiniMaxM1", "ModelConfig", "__version__", "load", "save"]
