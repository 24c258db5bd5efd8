"""The architecture of a MiniMax-M1 model, as a checked dataclass.

`hf_config.py` reads and writes `config.json`.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from m1_jax import hf_config, local_path
from m1_jax.hf_config import LIGHTNING, SOFTMAX, ConfigError

__all__ = [
    "LIGHTNING",
    "LIGHTNING_IMPLEMENTATIONS",
    "REMAT_POLICIES",
    "SOFTMAX",
    "SOFTMAX_IMPLEMENTATIONS",
    "ConfigError",
    "LayerLocation",
    "ModelConfig",
]

# The values of `ModelConfig.remat`, from the fastest to that which keeps least.
REMAT_POLICIES = ("none", "products", "dots", "attention", "layer")
# Beside None, the values of `ModelConfig.lightning_implementation`: the keys of
# `pallas_kernels.lightning_attention.api.IMPLEMENTATIONS`, which is not imported for them.
LIGHTNING_IMPLEMENTATIONS = ("reference", "chunked", "tpu", "gpu")
SOFTMAX_IMPLEMENTATIONS = ("xla", "splash")  # of `ModelConfig.softmax_implementation`, beside None


class LayerLocation(NamedTuple):
    """Where one layer's parameters and state lie: in which stack, and where in it."""

    group: int  # an index into `ModelConfig.layer_groups`, and the stack `layers.{group}`
    repeat: int  # number of the repeat of the unit, the index of the stack's first axis
    layer: int  # number of the layer in its group, the index of the stack's second axis

    @property
    def stack_index(self) -> tuple[int, int]:
        """Return the index of the layer on the two leading axes of its stack."""
        return self.repeat, self.layer


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one model. Every field changes the computation or its size.

    Fields of the architecture have the release's names. Sizes are integers of at least 1 and
    factors are finite numbers, unless stated otherwise.

    Attributes:
      vocab_size: V, rows of the embedding and columns of the head.
      hidden_size: D, the width of the residual stream.
      layer_types: "lightning" or "softmax" for each layer, in order.
      num_attention_heads: N, query heads of both kinds of attention.
      num_key_value_heads: K, key and value heads of softmax attention, a divisor of N. Lightning
        attention has N.
      head_dim: H, the width of one head's queries, keys and values.
      rotary_dim: R, the first dimensions of a head that softmax attention rotates, even and at
        most H.
      intermediate_size: F, the hidden width of one expert.
      num_local_experts: E, experts of each layer.
      num_experts_per_tok: A, the experts that a token goes to, at most E.
      rope_theta: base of the rotary frequencies, more than 0.
      rms_norm_eps: epsilon of all norms but the one inside lightning attention, more than 0.
      postnorm: whether the residual sum takes the norm's output, not its input.
      layernorm_linear_attention_alpha: factor of the residual around lightning attention.
      layernorm_linear_attention_beta: factor of lightning attention's output.
      layernorm_full_attention_alpha: factor of the residual around softmax attention.
      layernorm_full_attention_beta: factor of softmax attention's output.
      layernorm_mlp_alpha: factor of the residual around the experts.
      layernorm_mlp_beta: factor of the experts' output.
      shared_intermediate_size: more than 0 adds a shared expert to every layer. Its width is
        `intermediate_size`, as in the release, which reads only the sign of this field.
      router_aux_loss_coef: weight of the load-balancing loss in the training loss.
      initializer_range: standard deviation of fresh weights.
      max_position_embeddings: the most tokens of a sequence. The engine of `infer` refuses a larger
        limit. The model itself has no limit.
      remat: what the backward pass recomputes, one of `REMAT_POLICIES`: "none", "layer" (all but
        each layer's input), "attention" (all but layer inputs and outputs of attention blocks),
        "dots" (all but layer inputs and the outputs of dense matmuls) or "products" (as "dots", and
        the experts' first two matmuls are kept, too).
      expert_capacity: the most rows that a device takes for its experts, as a multiple of a
        balanced router's share, more than 0. None drops no token.
      lightning_implementation: one of `LIGHTNING_IMPLEMENTATIONS`, which then runs or raises.
        "chunked" is plain XLA. None takes what m1-selfcheck found right and fastest on the device.
        Where it has not run, it takes the Pallas kernels, "tpu", where a program is for a TPU from
        v5 on and the shapes fit, and "chunked" elsewhere, as on CPU and GPU.
      softmax_implementation: how softmax attention runs over whole rows, one of
        `SOFTMAX_IMPLEMENTATIONS`. "xla" is plain XLA. "splash" takes jax's splash attention, which
        runs on TPU alone. None takes it where a program is for a TPU, the shapes fit and
        m1-selfcheck did not find it wanting, and "xla" elsewhere, as on CPU. Prompts, decoding and
        the engine do not read it.

    Raises:
      ConfigError: a value that is out of range or contradicts another one.
    """

    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    # The defaults are the values of the release's config.json, except for postnorm and the alphas,
    # whose defaults are those of a plain pre-norm transformer.
    rope_theta: float = 1e7
    rms_norm_eps: float = 1e-5
    postnorm: bool = False
    layernorm_linear_attention_alpha: float = 1.0
    layernorm_linear_attention_beta: float = 1.0
    layernorm_full_attention_alpha: float = 1.0
    layernorm_full_attention_beta: float = 1.0
    layernorm_mlp_alpha: float = 1.0
    layernorm_mlp_beta: float = 1.0
    shared_intermediate_size: int = 0
    router_aux_loss_coef: float = 0.001
    initializer_range: float = 0.02
    max_position_embeddings: int = 10_240_000
    # The fields below are this code's own. They are not in config.json.
    remat: str = "none"
    expert_capacity: float | None = None
    lightning_implementation: str | None = None
    softmax_implementation: str | None = None

    def __post_init__(self):
        # Types and signs come first, since the comparisons below need numbers.
        for field in dataclasses.fields(self):
            hf_config.check_scalar(field.name, field.type, getattr(self, field.name))
        # A tuple and not a list, because jit hashes the config as a static part of the model.
        is_tuple = isinstance(self.layer_types, tuple) and len(self.layer_types) > 0
        self._check("layer_types", is_tuple, "a tuple of at least one layer")
        for kind in self.layer_types:
            hf_config.check_field(
                kind in (LIGHTNING, SOFTMAX), "layer_types", kind, f"{LIGHTNING} or {SOFTMAX}"
            )
        hf_config.check_scalar("num_hidden_layers", int, len(self.layer_types))
        self._check(
            "num_key_value_heads",
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"a divisor of num_attention_heads = {self.num_attention_heads}",
        )
        self._check(
            "rotary_dim",
            self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim,
            f"an even number up to head_dim = {self.head_dim}",
        )
        self._check(
            "num_experts_per_tok",
            self.num_experts_per_tok <= self.num_local_experts,
            f"at most num_local_experts = {self.num_local_experts}",
        )
        # Checked here, because names of all experts are listed before any weight is read.
        num_experts = self.num_local_experts * len(self.layer_types)
        if num_experts > hf_config.MAX_EXPERTS_OF_ALL_LAYERS:
            raise ConfigError(
                f"config: num_local_experts is {self.num_local_experts} in {len(self.layer_types)} "
                f"layers; wanted {hf_config.MAX_EXPERTS_OF_ALL_LAYERS} experts at most in all"
            )
        # The loop above skips the field, whose annotation is `float | None`.
        if self.expert_capacity is not None:
            hf_config.check_scalar("expert_capacity", float, self.expert_capacity)
        self._check("remat", self.remat in REMAT_POLICIES, f"one of {REMAT_POLICIES}")
        self._check(
            "lightning_implementation",
            self.lightning_implementation in (None, *LIGHTNING_IMPLEMENTATIONS),
            f"None or one of {LIGHTNING_IMPLEMENTATIONS}",
        )
        self._check(
            "softmax_implementation",
            self.softmax_implementation in (None, *SOFTMAX_IMPLEMENTATIONS),
            f"None or one of {SOFTMAX_IMPLEMENTATIONS}",
        )

    def _check(self, name: str, valid: bool, requirement: str) -> None:
        hf_config.check_field(valid, name, getattr(self, name), requirement)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def period(self) -> int:
        """Length of the shortest repeating unit of `layer_types`: 8 in the release."""
        num_layers = self.num_hidden_layers
        for period in range(1, num_layers + 1):
            # A last, partial repeat is not allowed: the model scans over equal repeats.
            if num_layers % period == 0 and self.layer_types[:period] * (num_layers // period) == (
                self.layer_types
            ):
                return period
        raise AssertionError("a list is always a repeat of itself")

    @property
    def repeats(self) -> int:
        """The number of repeats of the unit, R: 10 in the release."""
        return self.num_hidden_layers // self.period

    @property
    def layer_groups(self) -> tuple[tuple[str, int], ...]:
        """(kind, length) of each group of equal neighbours in the unit.

        The release has two groups: 7 lightning layers, then 1 softmax layer.
        """
        # Equal neighbours have parameters of equal shapes, so one scan runs over them.
        groups = itertools.groupby(self.layer_types[: self.period])
        return tuple((kind, len(list(layers))) for kind, layers in groups)

    def locate_layer(self, layer: int) -> LayerLocation:
        """Return where the parameters and the state of a layer of the model lie."""
        # `index` counts from the start of the unit, and at last from the start of the group.
        repeat, index = divmod(layer, self.period)
        group = 0
        while index >= self.layer_groups[group][1]:
            index -= self.layer_groups[group][1]
            group += 1
        return LayerLocation(group, repeat, index)

    @property
    def has_shared_expert(self) -> bool:
        return self.shared_intermediate_size > 0

    def attention_scales(self, kind: str) -> tuple[float, float]:
        """Return (alpha, beta) of the residual sum around attention of the given kind."""
        if kind == LIGHTNING:
            return self.layernorm_linear_attention_alpha, self.layernorm_linear_attention_beta
        return self.layernorm_full_attention_alpha, self.layernorm_full_attention_beta

    @classmethod
    def m1(cls) -> "ModelConfig":
        """Return the released MiniMax-M1 (40k and 80k): 456,089,655,296 parameters."""
        alpha = 3.5565588200778455  # of all three residual sums, from the release's config.json
        return cls(
            vocab_size=200_064,
            hidden_size=6144,
            layer_types=((LIGHTNING,) * 7 + (SOFTMAX,)) * 10,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            rotary_dim=64,
            intermediate_size=9216,
            num_local_experts=32,
            num_experts_per_tok=2,
            # The release's betas are 1.0, as by default.
            postnorm=True,
            layernorm_linear_attention_alpha=alpha,
            layernorm_full_attention_alpha=alpha,
            layernorm_mlp_alpha=alpha,
        )

    @classmethod
    def tiny(cls) -> "ModelConfig":
        """Return a model of 1.5 million parameters for tests, in proportions like the release's.

        Like the release, it has several repeats of the unit, several query heads per KV head, and
        heads whose total width is not `hidden_size`.
        """
        # Fields that are not named here keep the release's values, such as alpha and theta.
        return dataclasses.replace(
            cls.m1(),
            vocab_size=512,
            hidden_size=64,
            layer_types=((LIGHTNING,) * 3 + (SOFTMAX,)) * 2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rotary_dim=16,
            intermediate_size=96,
            num_local_experts=8,
            max_position_embeddings=4096,
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed `config.json` in the release's or in transformers' native spelling.

        Raises:
          ConfigError: a key that is unknown, missing, contradictory, or asks for a computation
            that this model does not have.
        """
        return cls(**hf_config.parse_config(hf))

    @classmethod
    def from_file(cls, path) -> "ModelConfig":
        """Read a `config.json` file, as `from_hf` does."""
        return cls.from_hf(hf_config.read_config_json(local_path.resolve_path(path)))

    def to_hf(self) -> dict[str, Any]:
        """Return `config.json` in the release's spelling, which `from_hf` reads back.

        Fields that config.json does not have return to their defaults.
        """
        return hf_config.format_config(
            {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        )
