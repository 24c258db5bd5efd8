"""With a matmul tile, a row of an expert has the same bits wherever it lies among others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1_jax import experts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [2**n for n in range(5, 13)])
def test_products_of_mixed_tiles_have_equal_bits(width, dtype):
    """Widths that are powers of two: what tiles of 16 and 4 rows need."""
    rng = np.random.default_rng(width)
    rows = jnp.asarray(rng.normal(size=(16, width)), dtype)
    product = jax.jit(jnp.matmul)
    for out in (96, 1024):
        matrix = jnp.asarray(rng.normal(size=(width, out)), dtype)
        together = np.asarray(product(rows, matrix))
        for size in (4, 8):
            parts = [product(rows[i : i + size], matrix) for i in range(0, len(rows), size)]
            np.testing.assert_array_equal(np.concatenate(parts), together)


# In float32, XLA:CPU of jaxlib 0.10.2 sums 832 products in another order for 16 rows than for 8 and
# 4, and 960 in another for 4 than for 8 and 16.
@pytest.mark.parametrize(("width", "hidden"), [(64, 128), (832, 64), (64, 960)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_the_other_rows_of_its_expert(dtype, width, hidden):
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, dtype)

    number = 3
    gate, up = draw(number, width, hidden), draw(number, width, hidden)
    down = draw(number, hidden, width)
    rows, weights = draw(64, width), jnp.asarray(rng.random(64), jnp.float32)

    @jax.jit
    def run(rows, sizes, weights):
        with experts.matmul_tile(8):
            return experts.grouped_mlp(rows, gate, up, down, sizes, weights)

    # Row 40 is the first, one in the middle, and the last of expert 1.
    results = []
    for before in (40, 27, 12):
        sizes = jnp.asarray([before, 41 - before + (before != 12) * 5, 10], jnp.int32)
        results.append(np.asarray(run(rows, sizes, weights))[40])
    alone = run(
        rows.at[0].set(rows[40]), jnp.asarray([0, 1, 0], jnp.int32), weights[40] + 0 * weights
    )
    results.append(np.asarray(alone)[0])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
