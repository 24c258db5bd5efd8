"""The device's side of an engine: its memory, its programs, and nothing that decides.

Whatever happens on the device is one of the calls of `Device`, with host arrays as arguments and in
one order. That is what the other processes of a mesh repeat (`execution/leader_follower.py`).
"""

import concurrent.futures
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from infer import config as config_lib
from infer.execution import (
    compiled_program,
    drafts,
    host_batch,
    partitions,
    program_spec,
    programs,
    slot_sampling,
    transfers,
)
from infer.scheduling import plan as plan_lib
from m1_jax import model as model_lib
from m1_jax.serving import state as state_lib

ProgramName = program_spec.ProgramName


class Device:
    """Memory and compiled programs.

    Attributes:
      limits: sizes of the pools, for the scheduler.
      num_programs: programs compiled.
    """

    def __init__(self, model: model_lib.MiniMaxM1, config: config_lib.EngineConfig):
        """Allocate all memory and compile all programs."""
        # The weights are kept as leaves: swaps replace them, the model's structure stays.
        weights, self._model_structure = jax.tree.flatten(model)
        self._layout = layout = model.layout
        num_partitions = 1 if layout is None else layout.axis_size("batch")
        # From here on, sizes of one partition.
        config = config.for_platform(jax.default_backend()).split(num_partitions)
        state = state_lib.init_serving_state(
            model.config,
            config.total_slots,
            config.total_pages,
            config.chunk_tokens,
            model.dtype,
            layout,
            config.record_routes,
        )
        sampling = jax.jit(
            slot_sampling.init_sampling_state,
            static_argnums=(0, 1, 2),
            out_shardings=None if layout is None else layout.activation_sharding("batch"),
        )(config.total_slots, model.config.vocab_size, num_partitions)
        self._buffers: dict[str, Any] = {"weights": weights, "state": state, "sampling": sampling}
        # What `swap_out` read, as trees of `_HostCopy`, by sequence id.
        self._host_copies: dict[Hashable, list[Any]] = {}
        self.limits = _measure_limits(config, state, num_partitions)
        self._programs: dict[
            tuple[ProgramName, int], compiled_program.CompiledProgram
        ] = {}  # by name and size
        self._specs = self._declare_steps(config)
        self._specs |= self._declare_transfers(config, model.config.vocab_size)
        self._compile_programs()
        self.num_programs = len(self._programs)

    @property
    def weights(self) -> list[jax.Array]:
        """The parameters, leaf by leaf."""
        return self._buffers["weights"]

    def run_program(self, name: ProgramName, size: int, *host_arguments: Any) -> Any:
        """Dispatch a program on host arrays, without waiting for it.

        Args:
          name: a program that `_declare_steps` or `_declare_transfers` declares for this config.
          size: which variant to run, by the rows or tokens of all partitions. 0 where there is one
            variant alone.

        Returns:
          The program's result, or None if it has none.
        """
        spec = self._specs[name]
        buffers = (self._buffers[buffer] for buffer in spec.takes)
        outputs = self._programs[name, size](*buffers, *host_arguments)
        if not spec.donates:
            return outputs
        *updated, result = outputs if spec.has_result else (outputs, None)
        # The old arrays are deleted by the donation, so the new ones must take their place now.
        self._buffers.update(zip(spec.donates, updated, strict=True))
        for array in jax.tree.leaves(result):
            # The transfer starts as soon as the program ends, before anybody asks for the values.
            array.copy_to_host_async()
        return result

    def swap_out(
        self, sequence_id: Hashable, slices: Sequence[tuple[np.int32, np.ndarray]]
    ) -> None:
        """Copy a sequence to host memory, and wait for it.

        Args:
          slices: (slot, pages) of `host_batch.split_pages`, which together cover the sequence.
        """
        parts = [self.run_program(ProgramName.READ_SEQUENCE, 0, *part) for part in slices]
        sampling = self.run_program(ProgramName.READ_SAMPLING, 0, slices[0][0])
        # `_HostCopy` waits for the data, and by that for every program dispatched so far.
        self._host_copies[sequence_id] = [jax.tree.map(_HostCopy, x) for x in (*parts, sampling)]

    def swap_in(self, sequence_id: Hashable, slices: Sequence[tuple[np.int32, np.ndarray]]) -> None:
        """Copy a sequence back from host memory.

        Args:
          slices: (slot, pages) as in `swap_out`. They may name another slot and other pages.
        """
        *parts, sampling = (
            jax.tree.map(lambda copy: copy.to_device(), x)
            for x in self._host_copies.pop(sequence_id)
        )
        for part_slice, part in zip(slices, parts, strict=True):
            self.run_program(ProgramName.WRITE_SEQUENCE, 0, *part_slice, part)
        self.run_program(ProgramName.WRITE_SAMPLING, 0, slices[0][0], sampling)

    def drop_host_copy(self, sequence_id: Hashable) -> None:
        """Forget the host's copy of a sequence."""
        self._host_copies.pop(sequence_id, None)

    def swap_weights(self, model: model_lib.MiniMaxM1) -> None:
        """Take other weights.

        Raises:
          ValueError: weights that `check_weights` refuses.
        """
        self.check_weights(model)
        # The caller may change host arrays later, and device_put need not copy them.
        leaves = [
            np.array(leaf) if isinstance(leaf, np.ndarray) else leaf
            for leaf in jax.tree.leaves(model)
        ]
        # The programs are compiled for these shardings, and refuse any other.
        self._buffers["weights"] = [
            jax.device_put(new_leaf, leaf.sharding)
            for leaf, new_leaf in zip(self._buffers["weights"], leaves, strict=True)
        ]

    def check_weights(self, model: model_lib.MiniMaxM1) -> None:
        """Raise ValueError for weights of other shapes, dtypes or layout."""
        leaves, structure = jax.tree.flatten(model)
        if structure != self._model_structure:
            raise ValueError(
                "swap_weights: got another model; wanted other weights of the same model"
            )
        for leaf, new_leaf in zip(self._buffers["weights"], leaves, strict=True):
            if (leaf.shape, leaf.dtype) != (new_leaf.shape, new_leaf.dtype):
                raise ValueError(
                    f"swap_weights: got {jax.typeof(new_leaf)}; wanted {jax.typeof(leaf)}, as the "
                    "weights before"
                )

    def keep_alive(self) -> None:
        """Do nothing: one process is not watched by others. `Leader` is."""

    def dismiss_followers(self) -> None:
        """Do nothing, likewise."""

    def close(self) -> None:
        """Do nothing, likewise."""

    def _declare_steps(
        self, config: config_lib.EngineConfig
    ) -> dict[ProgramName, program_spec.ProgramSpec]:
        """Return the programs that run the model."""
        tiles = programs.EngineTiles.of_config(config)
        structure = self._model_structure

        def decode(weights, state, sampling, batch, steps):
            model = jax.tree.unflatten(structure, weights)
            return programs.decode_tokens(
                model, state, sampling, batch, steps, tiles, config.decode_steps
            )

        def prefill(weights, state, sampling, batch, prompts):
            model = jax.tree.unflatten(structure, weights)
            return programs.prefill_prompts(model, state, sampling, batch, prompts, tiles)

        def verify(weights, state, sampling, batch, guesses):
            model = jax.tree.unflatten(structure, weights)
            return drafts.verify_drafts(model, state, sampling, batch, guesses, tiles)

        def declare(function, host_arguments):
            takes, donates = ("weights", "state", "sampling"), ("state", "sampling")
            if self._layout is not None:
                host_arguments = partitions.shard_rows(host_arguments, self._layout)
            return program_spec.ProgramSpec(function, takes, host_arguments, donates, True)

        num_partitions = self.limits.num_partitions

        def make_batch(rows):
            return host_batch.make_empty_batch(rows, config)

        steps = np.int32(0)  # an example: calls pass the steps to make
        specs = {
            ProgramName.DECODE: declare(
                decode,
                {
                    rows: (make_batch(rows), steps)
                    for rows in (num_partitions * size for size in config.decode_batch_sizes)
                },
            ),
            ProgramName.PREFILL: declare(
                prefill,
                {
                    num_partitions * tokens: (
                        make_batch(num_partitions * host_batch.MAX_PREFILL_CHUNKS),
                        host_batch.make_empty_prompts(tokens, config, num_partitions),
                    )
                    for tokens in config.prefill_tokens
                },
            ),
        }
        if config.draft_tokens:
            # One size alone: `Dispatcher` checks guesses only where few rows run.
            rows = num_partitions * config.decode_batch_sizes[0]
            guesses = np.zeros((rows, config.attention_tile), np.int32)
            specs[ProgramName.VERIFY] = declare(verify, {rows: (make_batch(rows), guesses)})
        return specs

    def _declare_transfers(
        self, config: config_lib.EngineConfig, vocab_size: int
    ) -> dict[ProgramName, program_spec.ProgramSpec]:
        """Return the programs that move memory, or change the sampling state of one slot."""
        slot, pages = np.int32(0), np.zeros(transfers.SWAP_PAGES, np.int32)

        def on_mesh(function):
            return functools.partial(function, self._layout)

        def change(buffer, function, *host_arguments):
            return program_spec.ProgramSpec(
                on_mesh(function), (buffer,), {0: host_arguments}, (buffer,)
            )

        def read(buffer, function, *host_arguments):
            return program_spec.ProgramSpec(on_mesh(function), (buffer,), {0: host_arguments})

        no_tokens, no_mask = host_batch.pad_tokens([]), host_batch.make_free_mask(vocab_size)
        specs = {
            ProgramName.COPY_STATE: change("state", transfers.copy_states, slot, slot),
            ProgramName.RESET_SLOT: change(
                "sampling", transfers.reset_slot, slot, *host_batch.make_bias({})
            ),
            ProgramName.COUNT_TOKENS: change(
                "sampling", transfers.count_tokens, slot, no_tokens, np.bool_(True)
            ),
            ProgramName.SET_MASK: change("sampling", transfers.set_mask, slot, no_mask),
        }
        if config.record_routes:
            specs[ProgramName.READ_EXPERT_IDS] = read("state", transfers.read_expert_ids, pages)
        if config.host_bytes:
            # Writing takes what reading returns, so reading is compiled here, ahead of the other
            # programs.
            specs[ProgramName.READ_SEQUENCE] = read("state", transfers.read_sequence, slot, pages)
            specs[ProgramName.READ_SAMPLING] = read("sampling", transfers.read_sampling_state, slot)
            for name in (ProgramName.READ_SEQUENCE, ProgramName.READ_SAMPLING):
                self._programs[name, 0] = self._compile_program(specs[name], 0)
            part, row = (
                self._programs[name, 0].output_shapes
                for name in (ProgramName.READ_SEQUENCE, ProgramName.READ_SAMPLING)
            )
            specs[ProgramName.WRITE_SEQUENCE] = change(
                "state", transfers.write_sequence, slot, pages, part
            )
            specs[ProgramName.WRITE_SAMPLING] = change(
                "sampling", transfers.write_sampling_state, slot, row
            )
        return specs

    def _compile_programs(self) -> None:
        """Compile all programs that are not compiled yet, several at a time."""
        # XLA compiles without the interpreter's lock, so threads are enough.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            futures = {
                (name, size): pool.submit(self._compile_program, spec, size)
                for name, spec in self._specs.items()
                for size in spec.host_arguments
                if (name, size) not in self._programs
            }
            self._programs |= {key: future.result() for key, future in futures.items()}

    def _compile_program(
        self, spec: program_spec.ProgramSpec, size: int
    ) -> compiled_program.CompiledProgram:
        return compiled_program.CompiledProgram(
            spec.function,
            [spec.takes.index(buffer) for buffer in spec.donates],
            *(self._buffers[buffer] for buffer in spec.takes),
            *spec.host_arguments[size],
            output_shardings=self._output_shardings(spec),
        )

    def _output_shardings(self, spec: program_spec.ProgramSpec) -> Any:
        """Return where a program's outputs lie. None: where its `shard_map` says."""
        if self._layout is None or not spec.donates:
            return None
        # Updated buffers lie as they were made, because all programs are compiled for that.
        buffers = tuple(
            jax.tree.map(lambda array: array.sharding, self._buffers[buffer])
            for buffer in spec.donates
        )
        if spec.has_result:  # it is needed on the host
            return *buffers, NamedSharding(self._layout.mesh, PartitionSpec())
        (buffer,) = buffers
        return buffer


def _measure_limits(
    config: config_lib.EngineConfig, state: state_lib.ServingState, num_partitions: int
) -> plan_lib.DeviceLimits:
    """Return the sizes of a partition's pools, and the bytes of a member on all its devices."""

    def member_bytes(kind):
        pools = [pool for pool in state.group_states if isinstance(pool, kind)]
        # Axis 2 is that of slots or pages, behind the two of the layer.
        # A model without such layers still divides by these bytes, hence at least 1.
        return sum(array.nbytes // array.shape[2] for array in jax.tree.leaves(pools)) or 1

    state_bytes = member_bytes(state_lib.LightningSlots)
    page_bytes = member_bytes(state_lib.PagedKVCache)
    if state.expert_id_pages is not None:
        expert_ids = state.expert_id_pages.expert_ids
        page_bytes += expert_ids.nbytes // expert_ids.shape[2]
    snapshots_bytes = config.num_snapshots * state_bytes + config.total_pages * page_bytes
    return plan_lib.DeviceLimits(
        num_slots=config.total_slots,
        num_pages=config.total_pages,
        max_prefill_chunks=host_batch.MAX_PREFILL_CHUNKS,
        page_bytes=page_bytes,
        state_bytes=state_bytes,
        cache_bytes=snapshots_bytes if config.prefix_cache and config.num_snapshots else 0,
        num_partitions=num_partitions,
    )


class _HostCopy:
    """This process's shards of an array, in host memory. It may span processes."""

    def __init__(self, array: jax.Array):
        self._shape, self._sharding = array.shape, array.sharding
        # Devices that have the same shard share a copy.
        self._shards: dict[str, tuple[np.ndarray, list[Any]]] = {}
        for shard in array.addressable_shards:
            key = str(shard.index)  # slices have no hash
            if key not in self._shards:
                self._shards[key] = np.asarray(shard.data), []
            self._shards[key][1].append(shard.device)

    def to_device(self) -> jax.Array:
        """Return the array again."""
        shards = [
            jax.device_put(data, device)
            for data, devices in self._shards.values()
            for device in devices
        ]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)
