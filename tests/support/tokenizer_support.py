"""The tiny tokenizer, for tests of everything that reads or writes text.

A test module takes the fixture by assignment: `tokenizer = tokenizer_support.tokenizer`.
"""

import functools
import tempfile

import pytest

from m1_jax import testing
from m1_jax import tokenizer as tokenizer_lib


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tiny tokenizer, its files still there."""
    directory = testing.write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return tokenizer_lib.Tokenizer.load(directory)


@functools.cache
def load_tokenizer():
    """Return the tiny tokenizer without its files, for functions that no fixture reaches."""
    with tempfile.TemporaryDirectory() as directory:
        return tokenizer_lib.Tokenizer.load(testing.write_tiny_tokenizer(directory))
