"""The devices that JAX finds, as one line of JSON. A process of its own runs this file by path.

Finding a TPU may wait for ever, as for hosts that do not come, or end the process. `m1-info` goes
on all the same. Nothing of our packages is imported here.
"""

import json
import sys

import jax


def describe_devices() -> dict:
    """Return the backend, the processes, and kind, index and memory of each local device."""
    return {
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "local": [_describe_device(device) for device in jax.local_devices()],
        "backend_version": " ".join(jax.local_devices()[0].client.platform_version.split()),
    }


def _describe_device(device) -> dict:
    stats = device.memory_stats() or {}  # None where a backend does not count, as on CPU
    return {
        "id": device.id,
        "kind": device.device_kind,
        "coords": getattr(device, "coords", None),
        "memory_bytes": stats.get("bytes_limit"),
        "memory_in_use_bytes": stats.get("bytes_in_use"),
    }


if __name__ == "__main__":
    json.dump(describe_devices(), sys.stdout)
