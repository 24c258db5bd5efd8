"""A digest of the weights that a run reads and does not train, for its checkpoints.

With LoRA a checkpoint holds adapters alone, and in RL a KL term compares with the first weights. So
a run that goes on must find the same weights again.
"""

import concurrent.futures
import functools
import hashlib
import pathlib

import numpy as np

from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import release

# What is read of all files together, at least two blocks of each. It is 256 MiB of the release's
# 912 GB: weights that were trained further differ in nearly every block.
_BLOCK_BYTES = 64 * 2**10
_NUM_BLOCKS = 4096
_NUM_READERS = 16  # files that are read at the same time, for file systems at the network


def digest_weights(directory: pathlib.Path) -> str:
    """Return a digest of a checkpoint's weights: names, sizes and samples of the files' bytes.

    It does not depend on where the directory lies, nor on the times of its files.

    Raises:
      CheckpointError: there are no weights.
    """
    files = _find_weight_files(directory)
    if not files:
        raise release.CheckpointError(
            f"{directory}: got no weights; wanted a release directory or a converted one"
        )
    num_blocks = max(2, _NUM_BLOCKS // len(files))
    with concurrent.futures.ThreadPoolExecutor(_NUM_READERS) as pool:
        digests = pool.map(functools.partial(_digest_file, num_blocks=num_blocks), files)
        total = hashlib.sha256()
        for file, digest in zip(files, digests, strict=True):
            total.update(f"{file.relative_to(directory)}\0{digest}\0".encode())
    return total.hexdigest()[:32]


def _find_weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    # Files right below params/ are Orbax's own, with the time of the conversion.
    arrays = (directory / format_lib.PARAMS_DIR).glob("*/**/*")
    files = [*arrays, *directory.glob("*.safetensors"), directory / "config.json"]
    return sorted(file for file in files if file.is_file())


def _digest_file(file: pathlib.Path, num_blocks: int) -> str:
    """Return a digest of a file's size and of blocks at equal distances, all bytes if it is small.

    The first and the last block are among them: headers, and what a truncated copy lacks.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= num_blocks * _BLOCK_BYTES:
            digest.update(stream.read())
        else:
            for offset in np.linspace(0, size - _BLOCK_BYTES, num_blocks).astype(np.int64):
                stream.seek(int(offset))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
