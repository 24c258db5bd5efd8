"""Matmul of rows sorted by group with one matrix per group, by the best way of each backend."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TILES = (256, 64)  # rows per CPU matmul: big ones first, small ones for what is left


def grouped_matmul(
    lhs: Float[Array, "M I"], rhs: Float[Array, "E I O"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M O"]:
    """Multiply the first group_sizes[0] rows by rhs[0], the next group_sizes[1] by rhs[1], ...

    The sizes must add up to M. TPU and GPU run `jax.lax.ragged_dot`; on CPU that costs a dense
    product with every group (13x slower measured at 8 groups), so a loop over tiles runs there.
    The choice is made when the program is lowered, so ahead-of-time compiles get the target's.
    """
    return jax.lax.platform_dependent(
        lhs, rhs, group_sizes, cpu=_loop_matmul, default=jax.lax.ragged_dot
    )


@jax.custom_vjp
def _loop_matmul(lhs, rhs, group_sizes):
    return _loop(lhs, rhs, group_sizes, transpose=False)


def _loop_fwd(lhs, rhs, group_sizes):
    return _loop(lhs, rhs, group_sizes, transpose=False), (lhs, rhs, group_sizes)


def _loop_bwd(residuals, grad):
    lhs, rhs, group_sizes = residuals
    return _loop(grad, rhs, group_sizes, transpose=True), _loop_rhs(lhs, grad, group_sizes), None


_loop_matmul.defvjp(_loop_fwd, _loop_bwd)


def _for_tiles(size, tiles, body, carry):
    """Run body(carry, first row, tile) over tiles that cover `size` rows, largest first."""
    done = jnp.zeros((), jnp.int32)
    for tile in tiles:
        count = size - done
        count = count // tile if tile != tiles[-1] else (count + tile - 1) // tile

        def step(i, carry, tile=tile, done=done):
            return body(carry, done + i * tile, tile)

        carry = jax.lax.fori_loop(0, count, step, carry)
        done = done + count * tile
    return carry


def _tiles(num_rows: int) -> tuple[int, ...]:
    return tuple(t for t in TILES if t <= num_rows) or (num_rows,)


def _loop(lhs, rhs, group_sizes, *, transpose):
    """lhs[rows of e] @ rhs[e] (or its transpose) for each group e in turn."""
    num_rows, tiles = lhs.shape[0], _tiles(lhs.shape[0])
    starts = jnp.cumsum(group_sizes) - group_sizes
    lhs = jnp.pad(lhs, ((0, tiles[-1]), (0, 0)))
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def group(out, xs):
        matrix, start, size = xs

        # The last tile runs over into the next group's rows, which that group then overwrites.
        def body(out, row, tile):
            rows = jax.lax.dynamic_slice_in_dim(lhs, start + row, tile)
            product = jax.lax.dot_general(rows, matrix, contract)
            return jax.lax.dynamic_update_slice_in_dim(out, product, start + row, 0)

        return _for_tiles(size, tiles, body, out), None

    width = rhs.shape[1 if transpose else 2]
    out = jnp.zeros((lhs.shape[0], width), lhs.dtype)
    out, _ = jax.lax.scan(group, out, (rhs, starts, group_sizes))
    return out[:num_rows]


def _loop_rhs(lhs, grad, group_sizes):
    """lhs[rows of e]^T @ grad[rows of e] for each group e."""
    tiles = _tiles(lhs.shape[0])
    starts = jnp.cumsum(group_sizes) - group_sizes
    lhs, grad = (jnp.pad(x, ((0, tiles[-1]), (0, 0))) for x in (lhs, grad))

    def group(_, xs):
        start, size = xs

        def body(total, row, tile):
            take = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=start + row, slice_size=tile
            )
            inside = row + jnp.arange(tile, dtype=jnp.int32) < size
            rows = jnp.where(inside[:, None], take(lhs), 0)
            return total + jax.lax.dot_general(rows, take(grad), (((0,), (0,)), ((), ())))

        shape = (lhs.shape[1], grad.shape[1])
        return None, _for_tiles(size, tiles, body, jnp.zeros(shape, lhs.dtype))

    return jax.lax.scan(group, None, (starts, group_sizes))[1]
