"""Random damages of one file: its bytes, its JSON, or what kind of file it is."""

import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from m1_jax.checkpoints import format as format_lib

# What takes the place of a JSON value, as JSON text.
ODD_VALUES = (
    *("NaN", "Infinity", "1e999", "1" + "0" * 400, "1" * 5000, "-1", "0", "1", "true", "null"),
    *('"text"', '""', "[]", "{}", "[[0]]", "1e30", "1000000000000000000000000000000", "3000000"),
    *("1000000000", "0.5", "512.0", "-0.0", '"../escaped.safetensors"', '"\\u0000"', '"\\ud800"'),
    *('"' + "x" * 5000 + '"', "[" * 300 + "]" * 300, "[" * 200_000, '{"a": 1, "a": 2}', "1e-50"),
)


def damage_bytes(rng: random.Random, raw: bytes) -> tuple[str, bytes]:
    """Return a damage in words, and the damaged bytes of a file."""
    place = rng.randrange(max(len(raw), 1))
    flipped = bytearray(raw or b"x")
    flipped[place] ^= 1 << rng.randrange(8)
    return rng.choice(
        (
            ("a byte less", raw[:-1]),
            ("half", raw[: len(raw) // 2]),
            ("empty", b""),
            ("7 bytes", raw[:7]),
            ("zeros", bytes(len(raw))),
            ("a byte more", raw + b"x"),
            ("a bit flipped", bytes(flipped)),
            ("no UTF-8", raw[:place] + b"\xff" + raw[place + 1 :]),
            ("a byte order mark", b"\xef\xbb\xbf" + raw),
            ("Windows line ends", raw.replace(b"\n", b"\r\n")),
            ("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            ("deep brackets", b"[" * 200_000),
            ("its middle cut out", raw[: place // 2] + raw[place:]),
            ("header length", rng.randrange(2**64).to_bytes(8, "little") + raw[8:]),
        )
    )


def damage_json(rng: random.Random, text: str) -> tuple[str, str]:
    """Return a damage in words, and a JSON text with one value or key damaged."""
    root = json.loads(text)
    parents = [node for node in _walk(root) if node]
    if not parents:
        return "another value", rng.choice(ODD_VALUES)
    parent = rng.choice(parents)
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    key, other = rng.choice(keys), rng.choice(keys)
    action = rng.choice(("value", "value", "value", "delete", "repeat", "rename", "swap"))
    mark = "\x01mark\x01"
    if action == "delete":
        del parent[key]
    elif action == "swap":
        parent[key], parent[other] = parent[other], parent[key]
    elif action in ("rename", "repeat") and isinstance(parent, dict):
        parent[mark] = parent.pop(key) if action == "rename" else parent[key]
    else:
        parent[key] = mark
    new_name = {"rename": rng.choice(("x" * 5000, "", "extra", "../x")), "repeat": key}.get(action)
    value = rng.choice(ODD_VALUES)
    replacement = json.dumps(new_name) if isinstance(new_name, str) else value
    text = json.dumps(root).replace(json.dumps(mark), replacement)
    shown = f" = {value[:40]}" if action == "value" else ""
    return f"JSON: {action} {str(key)[:40]}{shown}", text


def _walk(node: Any) -> Iterator[dict | list]:
    if isinstance(node, dict | list):
        yield node
        for child in node.values() if isinstance(node, dict) else node:
            yield from _walk(child)


def damage_kind(rng: random.Random, file: pathlib.Path, elsewhere: pathlib.Path) -> str:
    """Put something else in the file's place, and return what."""
    good_copy = file.with_name("copy-" + file.name)
    shutil.copyfile(file, good_copy)
    others = sorted(p for p in file.parent.iterdir() if p.is_file() and p not in (file, good_copy))
    actions: dict[str, Callable[[], Any]] = {
        "missing": lambda: None,
        "a directory": file.mkdir,
        "a pipe": lambda: os.mkfifo(file),
        "a link to nothing": lambda: file.symlink_to("nothing"),
        "a link to itself": lambda: file.symlink_to(file.name),
        "a link to /dev/zero": lambda: file.symlink_to("/dev/zero"),
        "a link to a good copy": lambda: file.symlink_to(good_copy.rename(elsewhere)),
        "another file": lambda: shutil.copyfile(rng.choice(others or [good_copy]), file),
    }
    name = rng.choice(list(actions))
    file.unlink()
    actions[name]()
    good_copy.unlink(missing_ok=True)
    return name


def damage_file(rng: random.Random, file: pathlib.Path, elsewhere: pathlib.Path) -> str:
    """Damage a file in one way, and return it in words. A link may lead to the path `elsewhere`."""
    raw = file.read_bytes()
    way = rng.random()
    if way < 0.2:
        return damage_kind(rng, file, elsewhere)
    if file.suffix == ".json" and way < 0.7:
        damage, text = damage_json(rng, raw.decode())
        if file.name == format_lib.MANIFEST_FILE and rng.random() < 0.5:
            damage, text = _damage_inner_json(rng, raw.decode())
        file.write_bytes(text.encode())
    elif file.suffix == ".safetensors" and way < 0.8:
        length = int.from_bytes(raw[:8], "little")
        damage, text = damage_json(rng, raw[8 : 8 + length].decode())
        header = text.encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    else:
        damage, damaged = damage_bytes(rng, raw)
        file.write_bytes(damaged)
    return damage


def _damage_inner_json(rng: random.Random, text: str) -> tuple[str, str]:
    """Damage the index or a header inside of a manifest, where they are texts."""
    manifest = json.loads(text)
    name = rng.choice([*manifest["shards"], "index"])
    holder = manifest if name == "index" else manifest["shards"]
    damage, holder[name] = damage_json(rng, holder[name])
    return f"{name}: {damage}", json.dumps(manifest)
