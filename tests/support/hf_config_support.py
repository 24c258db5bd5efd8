"""Changed and refused config.json files, for tests of `ModelConfig`."""

import pytest

from m1_jax import config as config_lib


def change_keys(hf, changes):
    """Return a config.json with other values; a key whose value is `...` is left out."""
    return {key: value for key, value in {**hf, **changes}.items() if value is not ...}


def assert_refused(hf, *words):
    """Assert that a config.json is refused with these words; return the message."""
    with pytest.raises(config_lib.ConfigError) as caught:
        config_lib.ModelConfig.from_hf(hf)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)
