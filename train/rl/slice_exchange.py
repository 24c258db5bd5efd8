"""Moves an array from one sharding to another on the same devices, by exchanging slices.

XLA can change a sharding by itself. Where a dimension's number of shards changes, it gathers the
whole array on every device first. Here no device holds more than its own slices, except where the
target replicates what the source splits.

Both meshes are cut into prime axes: axes of a prime size, of which each axis of either mesh is a
product. 4 x 8 devices and 2 x 16 devices are both 2 x 2 x 2 x 2 x 2. A dimension is cut into digits
in the same way, each of which the source and the target split over one prime axis or over none:

    experts=32 over expert=16, then over expert=8    digits 2 2 2 2 | 2, then 2 2 2 | 2 2

An exchange is then at most four steps, of which each is needed for some digits only:

    permute      devices swap whole shards, so that digits split before and after lie as they shall
    slice        a digit is cut along an axis that holds copies
    all-to-all   a digit is cut along an axis, and another digit that the axis cut becomes whole
    all-gather   a digit becomes whole on devices that hold copies afterwards
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class DimensionDigit:
    """A factor of a dimension's size, and the number of the prime axis that splits it.

    Attributes:
      size: a prime where an axis splits it, else any size.
      source: the axis in the source's sharding, or None: every device has all of it.
      target: the same in the target's sharding.
    """

    size: int
    source: int | None
    target: int | None


@dataclasses.dataclass(frozen=True)
class SliceExchange:
    """The steps from one sharding to another. Digits are numbered over all dimensions.

    Attributes:
      mesh: the devices along the prime axes, which are named by their numbers.
      digits: by dimension, its digits from the largest stride to the smallest.
      new_axes: by prime axis, the axis that takes its shards in the permutation.
      sliced: (digit, axis) pairs.
      swapped: (digit that is cut, digit that becomes whole, axis) triples.
      gathered: (digit, axis) pairs.
    """

    mesh: Mesh
    digits: tuple[tuple[DimensionDigit, ...], ...]
    new_axes: tuple[int, ...]
    sliced: tuple[tuple[int, int], ...]
    swapped: tuple[tuple[int, int, int], ...]
    gathered: tuple[tuple[int, int], ...]

    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return a global array with the target's sharding, as `dtype`. It is no alias of `x`.

        The leading axes that neither sharding splits are looped over, so that temporaries are
        those of one entry. The last two axes are one entry's own.
        """
        specs = [
            PartitionSpec(*(_spec_entry(dim, side) for dim in self.digits))
            for side in ("source", "target")
        ]
        num_looped = self._count_looped_axes()

        def exchange_local(x):
            # The cast comes first, because bfloat16 is half the bytes to move.
            exchange_entry = functools.partial(self._exchange_entry, num_looped=num_looped)
            if not num_looped:
                return exchange_entry(jnp.copy(x).astype(dtype))
            entries = x.reshape(-1, *x.shape[num_looped:])
            moved = jax.lax.map(lambda entry: exchange_entry(entry.astype(dtype)), entries)
            return moved.reshape(*x.shape[:num_looped], *moved.shape[1:])

        return jax.shard_map(
            exchange_local, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
        )(x)

    def _count_looped_axes(self) -> int:
        """Return how many leading axes no device splits, but for the last two axes."""
        whole = itertools.takewhile(
            lambda dim: all(digit.source is digit.target is None for digit in dim),
            self.digits[:-2],
        )
        return len(list(whole))

    def _exchange_entry(self, x: jax.Array, num_looped: int) -> jax.Array:
        """Exchange this device's part of an array without its first `num_looped` axes."""
        dims = self.digits[num_looped:]
        # An unsplit dimension is one digit, so a digit's number falls by one for each left out.
        digits = list(itertools.chain.from_iterable(dims))
        x = x.reshape([1 if digit.source is not None else digit.size for digit in digits])
        if self.new_axes != tuple(range(len(self.new_axes))):
            names = tuple(map(str, range(len(self.new_axes))))
            x = jax.lax.ppermute(x, names, self._device_pairs())
        for digit, axis in self.sliced:
            index = jax.lax.axis_index(str(axis))
            x = jax.lax.dynamic_slice_in_dim(x, index, 1, digit - num_looped)
        if self.swapped:
            x = self._swap_digits(x, num_looped)
        if self.gathered:
            x = self._gather_digits(x, num_looped)
        return x.reshape(
            [math.prod(digit.size for digit in dim if digit.target is None) for dim in dims]
        )

    def _device_pairs(self) -> list[tuple[int, int]]:
        """Return (from, to) pairs of device numbers of the permutation."""
        numbers = np.arange(self.mesh.size).reshape(self.mesh.devices.shape)
        # What lay along an axis before lies along its new axis afterwards.
        sources = np.transpose(numbers, np.argsort(self.new_axes).tolist())
        return list(zip(sources.ravel().tolist(), numbers.ravel().tolist(), strict=True))

    def _swap_digits(self, x: jax.Array, num_looped: int) -> jax.Array:
        cut, whole, axes = (list(column) for column in zip(*self.swapped, strict=True))
        cut, whole = ([digit - num_looped for digit in digits] for digits in (cut, whole))
        sizes = [x.shape[digit] for digit in cut]
        rest = [digit for digit in range(x.ndim) if digit not in cut]
        x = jnp.transpose(x, cut + rest)
        x = x.reshape(math.prod(sizes), *x.shape[len(cut) :])
        x = jax.lax.all_to_all(x, tuple(map(str, axes)), 0, 0, tiled=True)
        x = x.reshape(*sizes, *x.shape[1:])
        # The leading axes are now the digits that became whole, and these digits' own axes, of
        # size 1, stand for those that were cut.
        renamed = dict(zip(whole, cut, strict=True))
        order = whole + [renamed.get(digit, digit) for digit in rest]
        return jnp.transpose(x, np.argsort(order).tolist())

    def _gather_digits(self, x: jax.Array, num_looped: int) -> jax.Array:
        digits, axes = (list(column) for column in zip(*self.gathered, strict=True))
        digits = [digit - num_looped for digit in digits]
        sizes = [self.mesh.devices.shape[axis] for axis in axes]
        rest = [digit for digit in range(x.ndim) if digit not in digits]
        x = jax.lax.all_gather(jnp.squeeze(x, digits), tuple(map(str, axes)), axis=0)
        x = x.reshape(*sizes, *x.shape[1:])
        return jnp.transpose(x, np.argsort(digits + rest).tolist())


def plan_exchange(
    shape: Sequence[int], source: NamedSharding, target: NamedSharding
) -> SliceExchange | None:
    """Return the steps between two shardings of the same devices in the same order.

    None where the meshes, or a dimension's shards, have no common prime factors in the same order,
    like 2 x 3 beside 3 x 2 devices.
    """
    # Shardings of arrays have meshes of devices. Abstract ones occur while tracing alone.
    assert isinstance(source.mesh, Mesh)
    assert isinstance(target.mesh, Mesh)
    refined = _prime_axes(source.mesh, target.mesh)
    if refined is None:
        return None
    strides, primes = refined
    dims = []
    for number, size in enumerate(shape):
        source_axes, target_axes = (
            _split_axes(sharding, number, strides) for sharding in (source, target)
        )
        dim = _digits_of(size, source_axes, target_axes, primes)
        if dim is None:
            return None
        dims.append(dim)
    mesh = Mesh(
        source.mesh.devices.reshape(primes),
        tuple(map(str, range(len(primes)))),
        axis_types=(AxisType.Auto,) * len(primes),
    )
    digits = list(enumerate(itertools.chain.from_iterable(dims)))
    new_axes = _assign_axes([digit for _, digit in digits], primes)
    # By axis, the digit that it splits after the permutation and that shall become whole.
    leaving = {
        new_axes[d.source]: n for n, d in digits if d.source is not None and d.target is None
    }
    entering = {d.target: n for n, d in digits if d.source is None and d.target is not None}
    return SliceExchange(
        mesh=mesh,
        digits=tuple(dims),
        new_axes=new_axes,
        sliced=tuple((n, axis) for axis, n in entering.items() if axis not in leaving),
        swapped=tuple((n, leaving[axis], axis) for axis, n in entering.items() if axis in leaving),
        gathered=tuple((n, axis) for axis, n in leaving.items() if axis not in entering),
    )


def _spec_entry(dim: Sequence[DimensionDigit], side: str) -> tuple[str, ...] | None:
    """Return the mesh axes of a dimension, in the source's or the target's sharding."""
    axes = [getattr(digit, side) for digit in dim]
    return tuple(str(axis) for axis in axes if axis is not None) or None


def _prime_axes(*meshes: Mesh) -> tuple[list[int], list[int]] | None:
    """Return (strides in the flat order of devices, sizes) of the prime axes, largest first."""
    strides = {1}
    for mesh in meshes:
        sizes = list(mesh.shape.values())
        strides.update(math.prod(sizes[number:]) for number in range(len(sizes)))
    found = []
    for low, high in itertools.pairwise(sorted(strides)):
        if high % low:
            return None
        stride, rest, prime = low, high // low, 2
        while rest > 1:
            if rest % prime:
                prime += 1
                continue
            found.append((stride, prime))
            stride, rest = stride * prime, rest // prime
    found.sort(reverse=True)
    return [stride for stride, _ in found], [prime for _, prime in found]


def _split_axes(sharding: NamedSharding, dim: int, strides: Sequence[int]) -> list[int]:
    """Return the prime axes that split a dimension, in the order in which they do."""
    spec = sharding.spec[dim] if dim < len(sharding.spec) else None
    names = (spec,) if isinstance(spec, str) else spec or ()
    mesh_names = list(sharding.mesh.axis_names)
    axes = []
    for name in names:
        sizes = list(sharding.mesh.shape.values())[mesh_names.index(name) :]
        low, high = math.prod(sizes[1:]), math.prod(sizes)
        axes += [axis for axis, stride in enumerate(strides) if low <= stride < high]
    return axes


def _digits_of(
    size: int, source: Sequence[int], target: Sequence[int], primes: Sequence[int]
) -> tuple[DimensionDigit, ...] | None:
    """Return a dimension's digits, or None where the two shardings cut it differently."""
    digits = []
    for before, after in itertools.zip_longest(source, target):
        prime = {primes[axis] for axis in (before, after) if axis is not None}
        if len(prime) > 1:
            return None
        digits.append(DimensionDigit(prime.pop(), before, after))
    rest = size // math.prod(digit.size for digit in digits)
    return (*digits, DimensionDigit(rest, None, None))


def _assign_axes(digits: Sequence[DimensionDigit], primes: Sequence[int]) -> tuple[int, ...]:
    """Return by prime axis which axis takes its shards, so that later steps move least.

    A digit that stays split goes to its axis of the target. One that becomes whole goes, if it can,
    to an axis that shall split another digit: the two are swapped, and nothing is gathered.
    """
    new_axes: dict[int, int] = {
        d.source: d.target for d in digits if d.source is not None and d.target is not None
    }
    leaving = [d.source for d in digits if d.source is not None and d.target is None]
    entering = [d.target for d in digits if d.source is None and d.target is not None]
    others = [axis for axis in range(len(primes)) if axis not in {*new_axes, *leaving}]
    for axis in [axis for axis in leaving if axis in entering]:
        new_axes[axis] = axis
    for axis in leaving:
        free = [a for a in entering if a not in new_axes.values() and primes[a] == primes[axis]]
        if axis not in new_axes and free:
            new_axes[axis] = free[0]
    # The remaining ones stay where they are, if nothing else goes there.
    for axis in [*leaving, *others]:
        if axis not in new_axes and axis not in new_axes.values():
            new_axes[axis] = axis
    for axis in [*leaving, *others]:
        if axis not in new_axes:
            free = set(range(len(primes))) - set(new_axes.values())
            new_axes[axis] = min(a for a in free if primes[a] == primes[axis])
    return tuple(new_axes[axis] for axis in range(len(primes)))
