"""Golden files: what the release's own code computed, for `m1_jax.verify` to compare with.

A golden file holds what the release's own code computed for some tokens, in float32. Its keys:
    input_ids [B, T]             the tokens, the only key that must be there
    logits, logits_positions     [B, P, V] and the P positions of all T
    next_token_logprobs          [B, T - 1]
    aux_loss                     the load-balancing loss of all layers and tokens
    hidden_norms [L + 1]         mean norm of the embeddings, of each layer's output but the last's,
                                 and of the final norm's output
    lightning_state, lightning_layer         [B, N, H, H] of that layer after all tokens
    softmax_k_last4, softmax_v_last4, softmax_layer    [B, 4, K, H], rotated, of that layer
    decode_logits, decode_start  [B, S, V], one token at a time from that position on
    greedy_tokens [B, S]         the most likely tokens after the first `GREEDY_PROMPT_TOKENS`
    loss                         next-token cross-entropy of the first `LOSS_TOKENS`, plus
                                 router_aux_loss_coef * their balance loss
    grad/NAME                    gradient of that loss for the release's tensor NAME, [out, in]
"""

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike

from m1_jax import config as config_lib
from m1_jax import input_checks, json_file, local_path, sharding, strict_json


def count_row_copies(layout: sharding.MeshLayout | None, num_rows: int) -> int:
    """Return how often all rows must be there for a mesh to split them evenly."""
    num_parts = 1 if layout is None else layout.axis_size("batch")
    return math.lcm(num_rows, num_parts) // num_rows


def fetch_array(array: ArrayLike) -> np.ndarray:
    """Return an array on the host. With several processes, all of them call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def read_golden_arrays(path: str) -> dict[str, np.ndarray]:
    """Return the arrays of a golden file by key.

    Raises:
      ValueError: a file that is no .npz file, or damaged.
    """
    file = local_path.resolve_path(path, "--golden")
    try:
        if file.exists():
            json_file.check_regular_file(file, ValueError, "")
        # np.load alone would take bare arrays and pickles as well.
        with zipfile.ZipFile(file) as archive:
            return {
                member.filename.removesuffix(".npy"): _read_member(archive, member)
                for member in archive.infolist()
            }
    # An encrypted member raises RuntimeError, an unknown compression NotImplementedError.
    except (
        *(OSError, EOFError, ValueError, KeyError, RuntimeError, SyntaxError, tokenize.TokenError),
        *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    ) as error:
        raise ValueError(
            f"{path} is not a readable .npz file: {strict_json.shorten_text(str(error), 120)}. "
            "Make or download it again."
        ) from None


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Return one array, whose header is compared with its size before memory is taken for it."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"{member.filename} is of the .npy version {version}")
        shape, _, dtype = read_header(stream)
        wanted_bytes = math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python objects, which are read by pickle")
        if stream.tell() + wanted_bytes != member.file_size:
            raise ValueError(f"{member.filename} does not hold an array of its shape and dtype")
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)


class GoldenFile:
    """A golden file's arrays by key, and its input_ids as `tokens`, checked to fit the model.

    Attributes:
      tokens: the file's rows of tokens, on the devices. A mesh may need more rows than the file
        has: then all of them are there several times, which changes no mean over rows.
    """

    def __init__(
        self,
        path: str,
        arrays: Mapping[str, np.ndarray],
        config: config_lib.ModelConfig,
        layout: sharding.MeshLayout | None,
    ):
        self.path, self.arrays = path, arrays
        ids = self["input_ids"]
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"{path}: input_ids has shape {ids.shape} and dtype {ids.dtype}; wanted integers "
                "[B, T]"
            )
        input_checks.check_token_ids(ids, config.vocab_size)
        self._num_rows = len(ids)
        rows = np.tile(ids.astype(np.int32), (count_row_copies(layout, len(ids)), 1))
        if layout is None:
            self.tokens = jnp.asarray(rows)
        else:
            self.tokens = jax.make_array_from_callback(
                rows.shape, layout.activation_sharding("batch", None), lambda index: rows[index]
            )

    def own_rows(self, array: jax.Array) -> np.ndarray:
        """Return the rows of an array that are the file's, without the copies, on the host."""
        return fetch_array(array)[: self._num_rows]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.arrays:
            raise ValueError(
                f"{self.path}: {key} is missing; it has {', '.join(sorted(self.arrays)[:8])}... "
                "Is it a golden file?"
            )
        return self.arrays[key]
