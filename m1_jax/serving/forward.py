"""The model over a ragged batch: appends tokens of several sequences to the engine's memory.

The layers are the model's own modules. A layer is cut into three parts (`_apply_layer`), because
attention works on tiles of one sequence, the experts on tiles of one expert, and everything between
them on tiles of any rows. Only then does a row get the same bits in any batch
(`serving/ragged_batch.py`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import config as config_lib
from m1_jax import decoder_layer, experts, fsdp, layer_stack
from m1_jax import model as model_lib
from m1_jax.serving import lightning, ragged_batch, softmax
from m1_jax.serving import state as state_lib


def forward_ragged(
    model: model_lib.MiniMaxM1,
    tokens: Int[Array, "M"],
    batch: ragged_batch.RaggedBatch,
    state: state_lib.ServingState,
    output_rows: Int[Array, "O"] | None = None,
) -> tuple[Float[Array, "O v"], state_lib.ServingState]:
    """Append the tokens to their sequences. Return float32 logits of some rows, and the new state.

    On a mesh it runs inside of `sharding.run_sharded`. Each device has the rows, slots and pages of
    its own partition, and its heads and words of the vocabulary. Rows travel to their experts, as
    in training, and to nothing else.

    Args:
      tokens: token of each row, any id where the row is padding.
      output_rows: indices of the rows whose logits are returned. -1 returns zeros. None: all rows.
    """
    batch = batch.count_tiles_on_mesh()
    output_rows = jnp.arange(len(tokens)) if output_rows is None else output_rows
    # The outer select is for -1, which would read the last row's position.
    has_output = jnp.where(output_rows >= 0, batch.positions[output_rows] >= 0, False)
    # A context tells the experts the tile, since their products are made deep inside of the model.
    with experts.matmul_tile(batch.matmul_tile):
        # The embedding takes rows of tokens [B, T]: here one row of M tokens.
        x = model.embed(tokens[None], model.dtype, model.layout)[0]
        output = model.run_layers(x, batch, state.group_states, apply_layer=_apply_layer)
        expert_id_pages = (
            None
            if state.expert_id_pages is None
            else _record_expert_ids(state.expert_id_pages, output.per_layer, batch)
        )
        with jax.named_scope("head"):
            # Parameters are cast once, before the loop over tiles.
            norm, head = (
                fsdp.gather_params(module, model.layout, model.dtype)
                for module in (model.norm, model.head)
            )
            x = jnp.take(output.x, jnp.maximum(output_rows, 0), axis=0)
            logits = ragged_batch.map_row_tiles(
                lambda x: head(norm(x)), batch.matmul_tile, has_output, x
            )
    return logits, state_lib.ServingState(output.group_states, expert_id_pages)


def _apply_layer(
    layer: decoder_layer.DecoderLayer,
    x: Float[Array, "M D"],
    slopes: Float[Array, "N"],
    batch: ragged_batch.RaggedBatch,
    group_state: state_lib.GroupState,
    stack_index: layer_stack.StackIndex,
    layer_index: Int[Array, ""] | int,
) -> tuple[Float[Array, "M D"], Int[Array, "M A"], state_lib.GroupState]:
    """Run one layer. Return its output, the experts it chose, and the new group state.

    Arguments are those of `DecoderLayer.__call__`, with the batch as the context.
    """
    del layer_index  # selects recorded experts in training, and serving routes every token itself

    @jax.named_scope(layer.kind)
    def before_attention(x, positions):
        h = layer.input_norm(x)
        if layer.kind == config_lib.LIGHTNING:
            return h, layer.attention.project_inputs(h)  # lightning attention uses no positions
        return h, layer.attention.project_inputs(h, positions)

    def between_attention_and_experts(x, h, o):
        with jax.named_scope(layer.kind):
            o = layer.attention.project_output(h, o)
        x = layer.add_to_residual(x, h, o, layer.attention_scales)
        h = layer.moe_norm(x)
        # Router statistics serve the balance loss alone.
        weights, expert_ids, _ = layer.moe.route(h, None)
        return x, h, weights, expert_ids

    def after_experts(x, h, y):
        return layer.add_to_residual(x, h, layer.moe.combine(h, y), layer.moe_scales)

    # The three parts run on tiles of any rows, attention on tiles of one sequence.
    h, inputs = batch.map_matmul_tiles(before_attention, x, batch.positions)
    with jax.named_scope(layer.kind):
        if layer.kind == config_lib.LIGHTNING:
            assert isinstance(group_state, state_lib.LightningSlots)
            o, group_state = lightning.attend_slots(
                inputs, slopes, batch, group_state, stack_index, layer.attention.implementation
            )
        else:
            assert isinstance(group_state, state_lib.PagedKVCache)
            q, k, v = inputs
            o, group_state = softmax.attend_pages(q, k, v, batch, group_state, stack_index)
    x, h, weights, expert_ids = batch.map_matmul_tiles(between_attention_and_experts, x, h, o)
    # Padding goes to no expert, so that it never travels to another device.
    sent_ids = jnp.where(batch.positions[:, None] >= 0, expert_ids, layer.moe.no_expert)
    y, _ = layer.moe.dispatch(h, weights, sent_ids, stack_index)
    return batch.map_matmul_tiles(after_experts, x, h, y), expert_ids, group_state


def _record_expert_ids(
    expert_id_pages: state_lib.ExpertIdPages,
    expert_ids: Int[Array, "L M A"],
    batch: ragged_batch.RaggedBatch,
) -> state_lib.ExpertIdPages:
    """Write the experts of every real row into its page, and those of padding into page 0."""
    page, offset = batch.row_pages(expert_id_pages.expert_ids.shape[3])
    by_row = jnp.moveaxis(expert_ids, 0, 1).astype(expert_id_pages.expert_ids.dtype)
    return state_lib.ExpertIdPages(expert_id_pages.expert_ids.at[0, 0, page, offset].set(by_row))
