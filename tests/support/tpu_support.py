"""Programs compiled for a TPU that is not there, for tests of what XLA does around a kernel."""

import os
import re

import jax
import pytest
from jax.experimental import topologies
from turns_support import take_turns

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


# Compiling for one takes half a minute.
CHIPS_IN_TURNS = take_turns(*TOPOLOGIES)


def chip_sharding(topology):
    """Return the sharding of one chip of a topology; skip the test where libtpu is missing."""
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is loaded onto a chip
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    return jax.sharding.SingleDeviceSharding(device)


def compile_for_chip(function, shapes, chip, donate=()):
    """Compile a function of arrays, (shape, dtype) each, for one chip of a generation."""
    sharding = chip_sharding(TOPOLOGIES[chip])
    args = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    traced = jax.jit(function, donate_argnums=donate).trace(*args)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def whole_moves(program, shapes, operations=("copy", "pad", "fusion", "transpose")):
    """Return the instructions of the optimized HLO that move an array of one of these shapes."""
    # S(1) is VMEM: XLA may bring a small input on chip early; that is no copy in HBM.
    dims = "|".join(",".join(map(str, shape)) for shape in shapes)
    moved = rf"= \S*\[(?:{dims})\](?!\S*S\(1\))\S* (?:{'|'.join(operations)})\S*\(.*"
    return re.findall(moved, program.as_text())
