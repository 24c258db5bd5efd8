"""MiniMax-M1 in JAX: `load` a checkpoint, call the model, extend sequences."""

from m1_jax.checkpoint import load
from m1_jax.config import ModelConfig
from m1_jax.model import MiniMaxM1

__all__ = ["MiniMaxM1", "ModelConfig", "load"]
