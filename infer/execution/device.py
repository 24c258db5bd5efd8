"""The device's side of an engine: its memory, its programs, and nothing that decides.

Whatever happens on the device is one of the calls of `Device`, with host arrays as arguments and in
one order. That is what the other processes of a mesh repeat (`execution/leader_follower.py`).
"""

import concurrent.futures
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from infer import config as config_lib
from infer.execution import host_batch, program_spec, programs, slot_sampling, transfers
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
        layout = model.layout
        self._replicated = None if layout is None else NamedSharding(layout.mesh, PartitionSpec())
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
            slot_sampling.init_sampling_state, static_argnums=(0, 1), out_shardings=self._replicated
        )(config.total_slots, model.config.vocab_size)
        self._buffers: dict[str, Any] = {"weights": weights, "state": state, "sampling": sampling}
        # What `swap_out` read, as trees of `_HostCopy`, by sequence id.
        self._host_copies: dict[Hashable, list[Any]] = {}
        self.limits = _measure_limits(config, state)
        self._programs: dict[tuple[ProgramName, int], CompiledProgram] = {}  # by name and size
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
          size: which variant to run, by its rows or tokens. 0 where there is one variant alone.

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
        """Do nothing: one process has no followers that wait. `Leader` has some."""

    def dismiss_followers(self) -> None:
        """Do nothing, likewise."""

    def close(self) -> None:
        """Do nothing, likewise."""

    def _declare_steps(
        self, config: config_lib.EngineConfig
    ) -> dict[ProgramName, program_spec.ProgramSpec]:
        """Return the programs that run the model."""
        tiles = programs.EngineTiles(config.attention_tile, config.matmul_tile)
        structure = self._model_structure

        def decode(weights, state, sampling, batch, steps):
            model = jax.tree.unflatten(structure, weights)
            return programs.decode_tokens(
                model, state, sampling, batch, steps, tiles, config.decode_steps
            )

        def prefill(weights, state, sampling, batch, prompts):
            model = jax.tree.unflatten(structure, weights)
            return programs.prefill_prompts(model, state, sampling, batch, prompts, tiles)

        def verify(weights, state, sampling, batch, drafts):
            model = jax.tree.unflatten(structure, weights)
            return programs.verify_drafts(model, state, sampling, batch, drafts, tiles)

        def declare(function, host_arguments):
            takes, donates = ("weights", "state", "sampling"), ("state", "sampling")
            # What is sampled is needed on the host, and the sampling state is small: both are
            # replicated. The serving state keeps the shardings that it was made with.
            shardings = None
            if self._replicated is not None:
                shardings = (self._state_shardings(), self._replicated, self._replicated)
            return program_spec.ProgramSpec(
                function, takes, host_arguments, donates, True, shardings
            )

        def make_batch(rows):
            return host_batch.make_empty_batch(rows, config)

        steps = np.int32(0)  # an example: calls pass the steps to make
        specs = {
            ProgramName.DECODE: declare(
                decode, {rows: (make_batch(rows), steps) for rows in config.decode_batch_sizes}
            ),
            ProgramName.PREFILL: declare(
                prefill,
                {
                    tokens: (
                        make_batch(host_batch.MAX_PREFILL_CHUNKS),
                        host_batch.make_empty_prompts(tokens, config),
                    )
                    for tokens in config.prefill_tokens
                },
            ),
        }
        if config.draft_tokens:
            # One size alone: `Dispatcher` checks guesses only where few rows run.
            rows = config.decode_batch_sizes[0]
            drafts = np.zeros((rows, config.attention_tile), np.int32)
            specs[ProgramName.VERIFY] = declare(verify, {rows: (make_batch(rows), drafts)})
        return specs

    def _declare_transfers(
        self, config: config_lib.EngineConfig, vocab_size: int
    ) -> dict[ProgramName, program_spec.ProgramSpec]:
        """Return the programs that move memory, or change the sampling state of one slot."""
        slot, pages = np.int32(0), np.zeros(transfers.SWAP_PAGES, np.int32)
        state_shardings = None if self._replicated is None else self._state_shardings()

        def change_state(function, *host_arguments):
            buffers = ("state",)
            return program_spec.ProgramSpec(
                function, buffers, {0: host_arguments}, buffers, output_shardings=state_shardings
            )

        def change_sampling(function, *host_arguments):
            buffers = ("sampling",)
            return program_spec.ProgramSpec(
                function, buffers, {0: host_arguments}, buffers, output_shardings=self._replicated
            )

        def read(function, buffer, *host_arguments, output_shardings=self._replicated):
            return program_spec.ProgramSpec(
                function, (buffer,), {0: host_arguments}, output_shardings=output_shardings
            )

        no_tokens, no_mask = host_batch.pad_tokens([]), host_batch.make_free_mask(vocab_size)
        specs = {
            ProgramName.COPY_STATE: change_state(transfers.copy_states, slot, slot),
            ProgramName.RESET_SLOT: change_sampling(
                transfers.reset_slot, slot, *host_batch.make_bias({})
            ),
            ProgramName.COUNT_TOKENS: change_sampling(
                transfers.count_tokens, slot, no_tokens, np.bool_(True)
            ),
            ProgramName.SET_MASK: change_sampling(transfers.set_mask, slot, no_mask),
        }
        if config.record_routes:
            specs[ProgramName.READ_EXPERT_IDS] = read(transfers.read_expert_ids, "state", pages)
        if config.host_bytes:
            # XLA chooses the shardings of what is read: the state's, without the axis of slots or
            # pages, which is not split. Writing takes what reading returns, so reading is compiled
            # here, ahead of the other programs.
            specs[ProgramName.READ_SEQUENCE] = read(
                transfers.read_sequence, "state", slot, pages, output_shardings=None
            )
            self._programs[ProgramName.READ_SEQUENCE, 0] = self._compile_program(
                specs[ProgramName.READ_SEQUENCE], 0
            )
            part = self._programs[ProgramName.READ_SEQUENCE, 0].output_shapes
            specs[ProgramName.WRITE_SEQUENCE] = change_state(
                transfers.write_sequence, slot, pages, part
            )
            shapes = jax.eval_shape(transfers.read_sampling_state, self._buffers["sampling"], slot)
            sampling = self._replicate_shapes(shapes)
            specs[ProgramName.READ_SAMPLING] = read(transfers.read_sampling_state, "sampling", slot)
            specs[ProgramName.WRITE_SAMPLING] = change_sampling(
                transfers.write_sampling_state, slot, sampling
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

    def _compile_program(self, spec: program_spec.ProgramSpec, size: int) -> "CompiledProgram":
        return CompiledProgram(
            spec.function,
            [spec.takes.index(buffer) for buffer in spec.donates],
            *(self._buffers[buffer] for buffer in spec.takes),
            *spec.host_arguments[size],
            output_shardings=spec.output_shardings,
        )

    def _state_shardings(self) -> Any:
        return jax.tree.map(lambda array: array.sharding, self._buffers["state"])

    def _replicate_shapes(self, shapes: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._replicated), shapes
        )


def _measure_limits(
    config: config_lib.EngineConfig, state: state_lib.ServingState
) -> plan_lib.DeviceLimits:
    """Return the sizes of the pools, and the bytes of their members on all devices together."""

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
    )


class _HostCopy:
    """This process's shards of an array, in host memory. It may span processes."""

    def __init__(self, array: jax.Array):
        self._shape, self._sharding = array.shape, array.sharding
        self._shards = [
            (shard.device, np.asarray(shard.data)) for shard in array.addressable_shards
        ]

    def to_device(self) -> jax.Array:
        """Return the array again."""
        shards = [jax.device_put(data, device) for device, data in self._shards]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)


class CompiledProgram:
    """A function compiled for arguments of given shapes, some of which it consumes.

    Args:
      function: takes the arguments.
      donated: numbers of the arguments whose memory it reuses.
      *arguments: arrays or shapes, with the shardings that calls will have.
      output_shardings: shardings of its outputs, None for one device or XLA's choice.
    """

    def __init__(
        self,
        function: Callable,
        donated: Sequence[int],
        *arguments: Any,
        output_shardings: Any = None,
    ):
        # Leaves go in one by one: lowering puts descriptions of arrays into the classes of its
        # arguments, and shape checks of those classes, on in tests, refuse them.
        ends = np.cumsum([0, *(len(jax.tree.leaves(argument)) for argument in arguments)])
        leaves, tree = jax.tree.flatten(arguments)
        donated_leaves = [leaf for arg in donated for leaf in range(ends[arg], ends[arg + 1])]
        flat = jax.jit(
            lambda *leaves: function(*jax.tree.unflatten(tree, leaves)),
            donate_argnums=donated_leaves,
            out_shardings=output_shardings,
        )
        # Compiled here and never again: a call with other shapes is an error, not a compilation.
        self._compiled = flat.lower(*leaves).compile()

    @property
    def output_shapes(self) -> Any:
        """Shapes and shardings of what it returns."""
        return jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            self._compiled.out_info,
            self._compiled.output_shardings,
        )

    def __call__(self, *arguments: Any) -> Any:
        return self._compiled(*jax.tree.leaves(arguments))
