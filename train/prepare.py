"""Command: raw JSONL, Parquet or ArrayRecord files to checked ArrayRecord shards.

    python -m train.prepare --src='raw/*.jsonl' --dst=DIR --shards=64

Every record is checked as training checks it: it is a text, or a conversation that the chat
template can render. Its keys text, messages and tools stay, as JSON. A group of a shard holds one
record, so that training reads in any order. The result grows in DST.partial and is renamed when it
is complete. The same command, run again after an interruption, goes on with the first shard that is
missing.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from typing import Any

import tqdm
from absl import app, flags
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from m1_jax import command_help, durable
from m1_jax import tokenizer as tokenizer_lib
from train.data import chat
from train.data import records as records_lib

MANIFEST_FILE = "prepare.json"
_RECORD_KEYS = ("text", "messages", "tools")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to prepare.

    Attributes:
      src: a file, a directory or a pattern of raw files, see `records.RecordFiles`.
      dst: the local directory to make.
      shards: number of files to write, at least 1 and at most the number of records.
      kind: what every record must be, one of `chat.RECORD_KINDS`.
      profile: profile of the chat template, one of `chat.PROFILES`.
      checkpoint: a directory with a tokenizer, to count tokens, too. Empty counts records alone.
      progress: show a progress bar.
    """

    src: str
    dst: str
    shards: int = 16
    kind: str = "auto"
    profile: str = "release"
    checkpoint: str = ""
    progress: bool = True

    def __post_init__(self):
        if not self.src or not self.dst:
            raise ValueError("got an empty path; wanted both --src and --dst")
        if "://" in self.dst:
            raise ValueError(f"--dst is {self.dst}; wanted a local directory. Copy it later.")
        if self.shards < 1:
            raise ValueError(f"--shards is {self.shards}; wanted at least 1")


def run(config: PrepareConfig) -> pathlib.Path:
    """Write the shards, and return the finished directory.

    The directory's `prepare.json` holds the source's fingerprint and the number of records in each
    shard. With a tokenizer it also holds the number of tokens in each shard, and in the longest
    record of each.

    Raises:
      DataError: training could not use a record. The message names its file and number.
      FileExistsError: the destination exists, or an unfinished one has another source.
    """
    dst = pathlib.Path(config.dst)
    if dst.exists():
        raise FileExistsError(f"{dst} exists; wanted a new directory. Remove it or choose another.")
    # The directory has its name only once it is complete.
    with contextlib.closing(records_lib.RecordFiles("--src", config.src)) as records:
        partial = _write_shards(dst.with_name(dst.name + ".partial"), config, records)
    partial.rename(dst)
    return dst


def _write_shards(
    partial: pathlib.Path, config: PrepareConfig, records: records_lib.RecordFiles
) -> pathlib.Path:
    if len(records) < config.shards:
        raise ValueError(f"--shards is {config.shards}; wanted at most the {len(records)} records")
    encoder = None
    if config.checkpoint:
        tokenizer = tokenizer_lib.Tokenizer.load(config.checkpoint)
        encoder = chat.RecordEncoder(tokenizer, profile=config.profile)
    manifest = _open_manifest(partial, config, records)
    with tqdm.tqdm(total=len(records), unit=" records", disable=not config.progress) as bar:
        for shard in range(config.shards):
            name = f"{shard:05d}-of-{config.shards:05d}.arrayrecord"
            start, end = (len(records) * i // config.shards for i in (shard, shard + 1))
            # The manifest lists whole shards alone, so an interrupted shard is written again.
            if name not in manifest["shards"]:
                # Readers find shards by their suffix, which an unfinished one does not have.
                growing = partial / (name + ".tmp")
                counts = _write_shard(growing, records, range(start, end), config, encoder, bar)
                growing.rename(partial / name)
                manifest["shards"][name] = counts
                _write_manifest(partial / MANIFEST_FILE, manifest)
            else:
                bar.update(end - start)
    return partial


def _open_manifest(partial: pathlib.Path, config: PrepareConfig, records) -> dict[str, Any]:
    """Return the manifest of an interrupted run of this command, or begin one."""
    # What decides the bytes of the shards. A run with other settings cannot go on with them.
    settings = {k: getattr(config, k) for k in ("shards", "kind", "profile", "checkpoint")}
    identity = {**settings, "source": records.fingerprint()}
    path = partial / MANIFEST_FILE
    if not path.exists():
        partial.mkdir(parents=True, exist_ok=True)
        _write_manifest(path, {"of": identity, "shards": {}})
    manifest = json.loads(path.read_text())
    if manifest["of"] != identity:
        raise FileExistsError(
            f"{partial} is an interrupted preparation of other data or with other settings. "
            "Remove it to start anew, or choose another --dst."
        )
    return manifest


def _write_manifest(path: pathlib.Path, manifest: dict[str, Any]) -> None:
    durable.write_text_atomically(path, json.dumps(manifest, indent=1))


def _write_shard(path, records, indices, config: PrepareConfig, encoder, bar) -> dict[str, int]:
    """Write one shard and return its counts."""
    counts = {"records": len(indices)}
    if encoder is not None:
        counts |= {"tokens": 0, "longest_tokens": 0}
    # A reader decompresses a whole group for one record, hence groups of one.
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    try:
        for index in indices:
            record = records.read(index)
            try:
                line, tokens = _check_record(record, config, encoder)
            except ValueError as error:
                raise records_lib.DataError(f"{records.location(index)}: {error}") from None
            writer.write(line)
            if encoder is not None:
                counts["tokens"] += tokens
                counts["longest_tokens"] = max(counts["longest_tokens"], tokens)
            bar.update()
    finally:
        writer.close()
    return counts


def _check_record(
    record: dict, config: PrepareConfig, encoder: chat.RecordEncoder | None
) -> tuple[bytes, int]:
    """Return a record as JSON, and its number of tokens, which is 0 without a tokenizer."""
    tokens = 0
    if encoder is not None:
        tokens = len(encoder.encode(record, config.kind).tokens)
    elif chat.is_chat(record, config.kind):
        # Rendered for its errors alone.
        chat.render_conversation(record["messages"], record.get("tools"), profile=config.profile)
    content = {key: record[key] for key in _RECORD_KEYS if record.get(key) is not None}
    return json.dumps(content, ensure_ascii=False).encode(), tokens


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    try:
        config = PrepareConfig(
            **{f.name: getattr(flags.FLAGS, f.name) for f in dataclasses.fields(PrepareConfig)}
        )
        print(f"wrote {run(config)}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _define_flags() -> None:
    flags.DEFINE_string("src", None, "File, directory or pattern to read.", required=True)
    flags.DEFINE_string("dst", None, "Directory to make; must not exist.", required=True)
    flags.DEFINE_integer("shards", 16, "How many files to write.")
    flags.DEFINE_enum("kind", "auto", chat.RECORD_KINDS, "What every record must be.")
    flags.DEFINE_enum("profile", "release", chat.PROFILES, "Chat template.")
    flags.DEFINE_string("checkpoint", "", "Directory with a tokenizer: count tokens too.")
    flags.DEFINE_bool("progress", True, "Show a progress bar.")


def cli() -> None:
    _define_flags()
    command_help.prepare_help(__doc__, __name__)
    app.run(main)


if __name__ == "__main__":
    cli()
