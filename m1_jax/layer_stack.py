"""Stacks of equal layers: how they are made, sliced, looped over and rematerialised.

A model's layers repeat in a unit (the release: seven lightning layers, then one softmax layer, ten
times). Neighbours of one kind in the unit are a group. All layers of a group, over all repeats of
the unit, are one module whose parameters have two leading axes: R repeats, and J layers of the
group. A program therefore has one loop body per group, however many layers the model has.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m1_jax import fsdp, sharding

# Names of what a layer computes, for rematerialisation: the output of its attention block, and what
# `experts.py` names so, the outputs of the experts' `gate` and `up`.
ATTENTION_NAME, EXPERT_PRODUCT_NAMES = "attention", ("experts_gate", "experts_up")

# A layer's place on the two leading axes of its stack: (repeat of the unit, number in the group).
# `ModelConfig.locate_layer` has it as Python integers. In a scan the two numbers are traced.
StackIndex = tuple[Int[Array, ""] | int, Int[Array, ""] | int]


class ApplyLayer(Protocol):
    """A function that runs one layer, with the signature of `DecoderLayer.__call__`.

    Training and decoding have whole rows [B, T, D], a `ForwardContext`, and router statistics as
    the output. Serving has rows of many sequences [M, D], a `RaggedBatch`, and the experts chosen.
    """

    def __call__(
        self,
        layer: Any,  # the `DecoderLayer`, with its parameters gathered
        x: Float[Array, "*rows D"],
        slopes: Float[Array, "N"],
        context: Any,  # what all layers of the pass share
        group_state: Any,  # state of all layers of the group, None if no state is kept
        stack_index: StackIndex,
        layer_index: Int[Array, ""] | int,
        /,
    ) -> tuple[Float[Array, "*rows D"], Any, Any]:
        """Return x after the layer, the layer's output, and the new group state."""
        ...


class LayersOutput(NamedTuple):
    """What a run through all L layers returns."""

    x: Float[Array, "*rows D"]  # after the last layer
    # What every layer returned beside x and its state, stacked [L, ...]: router statistics in a
    # forward pass, expert ids in serving.
    per_layer: Any
    group_states: tuple[Any, ...]  # by group, the new one; None where no state was given
    layer_outputs: Float[Array, "L *rows D"] | None  # x after every layer, if asked to keep it


def make_stack(make_layer: Callable, shape: tuple[int, int], rngs: nnx.Rngs) -> Any:
    """Make the layers of one group, of every repeat of the unit, on two leading axes.

    Args:
      make_layer: called as make_layer(rngs) for one layer.
      shape: repeats of the unit, and layers of the group.
    """

    # `nnx.vmap` stacks what the constructor makes, so layers know nothing of the leading axes.
    @nnx.vmap
    @nnx.vmap
    def make_layers(key):
        return make_layer(nnx.Rngs(key))

    stacked = make_layers(jax.random.split(rngs.params(), shape))
    # The constructor named the axes of one layer's parameters: name the two that vmap added.
    for _, node in nnx.iter_graph(stacked):
        if isinstance(node, nnx.Param):
            names = node.get_metadata()["logical_axes"]
            node.set_metadata(logical_axes=("layers", "layers", *names))
    return stacked


# `scan_layer_groups` has two loops. Both carry x, and group states in full: a layer writes its
# entry of them in place.
#
#                 carry               xs
#   scan_repeats  x, group states     stacks, each [R, J, ...] -> [J, ...], and the repeat's number
#   scan_layers   x, group state      its stack [J, ...] -> [...], and the layer's number in it
#
# There are two forms, which differ in who slices the parameters. Without states (training) the
# stacks are xs: the backward pass of a scan stacks the gradients of its xs. With states (no
# gradients) `slice_layer` cuts both axes at once out of the closed-over stacks. As xs, each slice
# would be copied: all experts of a layer for every token that is decoded. That made decoding on CPU
# 2 to 5 times slower (docs/log.md, "Experts on CPU").


def scan_layer_groups(
    apply_stacked: Callable,
    stacks: Sequence[Any],
    group_sizes: Sequence[int],
    num_repeats: int,
    x: Float[Array, "*rows D"],
    group_states: Sequence[Any] | None,
    slice_layer: Callable[[Any, StackIndex], Any],
    keep_layer_outputs: bool = False,
) -> LayersOutput:
    """Apply all layers in order: a scan over repeats of the unit, in it a scan for each group.

    Args:
      apply_stacked: called as apply_stacked(layer, x, group_state, stack_index, layer_index), with
        what `slice_layer` returns as the layer. Returns x, an output, and the new group state.
      stacks: by group, arrays [R, J, ...].
      group_sizes: by group, J.
      num_repeats: R.
      group_states: by group, arrays [R, J, ...], of which a layer updates its own entry. None: no
        layer has a state.
      slice_layer: returns the layer at a stack index of a stack.
    """
    group_starts = tuple(itertools.accumulate(group_sizes, initial=0))

    def scan_repeats(carry, xs):
        x, group_states = carry
        *stacks_of_repeat, repeat = xs
        new_group_states, outputs = [], []
        for group, num_layers in enumerate(group_sizes):
            # `group` as a default: a closure would read the loop's variable when it is called.
            def scan_layers(carry, xs, group=group):
                x, group_state = carry
                *sliced, layer_number = xs
                stack_index = (repeat, layer_number)
                layer = sliced[0] if sliced else slice_layer(stacks[group], stack_index)
                layer_index = repeat * group_starts[-1] + group_starts[group] + layer_number
                x, output, group_state = apply_stacked(
                    layer, x, group_state, stack_index, layer_index
                )
                return (x, group_state), (output, x if keep_layer_outputs else None)

            # An empty slice where `scan_layers` takes its layer out of the stacks itself.
            group_xs = (*stacks_of_repeat[group : group + 1], num_layers)
            carry = (x, group_states[group])
            (x, new_group_state), group_outputs = _scan_indexed(scan_layers, carry, group_xs)
            new_group_states.append(new_group_state)
            outputs.append(group_outputs)
        outputs = jax.tree.map(lambda *groups: jnp.concatenate(groups), *outputs)
        return (x, tuple(new_group_states)), outputs

    if group_states is None:
        carry, xs = (x, (None,) * len(group_sizes)), (*stacks, num_repeats)
    else:
        carry, xs = (x, tuple(group_states)), (num_repeats,)
    (x, new_group_states), outputs = _scan_indexed(scan_repeats, carry, xs)
    # [R, layers of the unit, ...] -> [L, ...]
    per_layer, layer_outputs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)
    return LayersOutput(x, per_layer, new_group_states, layer_outputs)


def slice_layer(
    stack: Any, stack_index: StackIndex, *, dtype: jnp.dtype, experts_stay_stacked: bool
) -> Any:
    """Return one layer of a stack of parameters and arrays, for computing in `dtype`.

    With `experts_stay_stacked`, `experts.py` reads only the experts that have rows.
    """

    def slice_leaf(leaf):
        if not isinstance(leaf, nnx.Param):
            return leaf[stack_index]
        metadata = leaf.get_metadata()
        # A cast would make a copy of the whole stack, so parameters that need one are sliced first.
        needs_no_cast = leaf.dtype in (dtype, jnp.int8) or metadata["float32"]
        if experts_stay_stacked and needs_no_cast and "experts" in metadata["logical_axes"]:
            return leaf
        return leaf.replace(leaf[...][stack_index])

    return sharding.map_params(slice_leaf, stack)


def _scan_indexed(body: Callable, carry: Any, xs: tuple[Any, ...]) -> tuple[Any, Any]:
    """Scan over arrays and the index of their leading axis, whose length is `xs[-1]`.

    A single step is written out without a loop. Its index is the Python number 0, so that slices
    at it are static.
    """
    *arrays, count = xs
    if count > 1:
        return jax.lax.scan(body, carry, (*arrays, jnp.arange(count)))
    carry, out = body(carry, (*jax.tree.map(lambda a: a[0], arrays), 0))
    return carry, jax.tree.map(lambda a: a[None], out)


def apply_remat(policy: str, function: Callable, has_gathered_params: bool) -> Callable:
    """Return `function` of one layer, with its residuals dropped as `ModelConfig.remat` says."""
    if policy == "none" and not has_gathered_params:
        return function
    policies = jax.checkpoint_policies
    # A grouped product of experts is no dot of JAX, so "dots" alone drops it.
    dots = policies.dots_with_no_batch_dims_saveable
    saved = {
        # Gathered parameters are gathered again in the backward pass: kept for all layers, they
        # would not fit.
        "none": policies.save_anything_except_these_names(fsdp.GATHERED_NAME),
        "products": policies.save_from_both_policies(
            dots, policies.save_only_these_names(*EXPERT_PRODUCT_NAMES)
        ),
        "dots": dots,
        "attention": policies.save_only_these_names(ATTENTION_NAME),
        "layer": None,
    }
    return jax.checkpoint(function, policy=saved[policy])
