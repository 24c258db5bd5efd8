"""A row has the same bits in matrix products of 2 to 32 rows: what mixed tiles of experts need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1_jax import experts

SIZES = (2, 4, 8, 16, 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("width", "out"), [(64, 96), (96, 64), (512, 1024), (1024, 512)])
def test_products_of_few_rows_have_equal_bits(width, out, dtype):
    rng = np.random.default_rng(width)
    rows = jnp.asarray(rng.normal(size=(SIZES[-1], width)), dtype)
    matrix = jnp.asarray(rng.normal(size=(width, out)), dtype)
    product = jax.jit(jnp.matmul)
    all_ = np.asarray(product(rows, matrix))
    for size in SIZES:
        parts = [product(rows[i : i + size], matrix) for i in range(0, len(rows), size)]
        np.testing.assert_array_equal(np.concatenate(parts), all_)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_the_other_rows_of_its_expert(dtype):
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, dtype)

    number, width, hidden = 3, 64, 96
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
