"""Command: raw files of records to checked ArrayRecord shards.

    python -m train.prepare --src='raw/*.jsonl' --dst=DIR --shards=64

Files are JSON in lines or lists (also .gz and .zst), Parquet or ArrayRecord. Every record is
checked as training checks it: it is a text, or a conversation that the chat template can render. It
becomes JSON with `text`, or with `messages` and `tools`, whatever columns it came in. --bad=skip
leaves out records that cannot be used, and lists each in prepare.json with its file and line. A
group of a shard holds one record, so that training reads in any order. The result grows in
DST.partial and is renamed when it is complete. The same command, run again after an interruption,
goes on with the first shard that is missing.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from typing import Any

from absl import flags
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from m1_jax import command_help, configlib, durable, local_path, progress_bar
from m1_jax import tokenizer as tokenizer_lib
from train.data import chat, columns, data_errors, find_files
from train.data import config as data_config
from train.data import records as records_lib

MANIFEST_FILE = "prepare.json"
_DEFAULT_SHARDS = 16


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to prepare.

    Attributes:
      src: a file, a folder or a pattern of raw files, see `find_files.find_files`.
      dst: the local directory to make.
      shards: number of files to write, at most the number of records. 0 writes 16, or one for each
        record where there are fewer.
      kind: what every record must be, one of `chat.RECORD_KINDS`.
      profile: profile of the chat template, one of `chat.PROFILES`.
      bad: what becomes of records that cannot be used: "error" or "skip", as in
        `config.DataConfig.bad_records`. An interrupted preparation goes on with either.
      max_bad_share: largest share of the records that "skip" leaves out, 0 to 1.
      checkpoint: a directory with a tokenizer, to count tokens, too. Empty counts records alone.
      progress: show a progress bar.
    """

    src: str
    dst: str
    shards: int = 0
    kind: str = "auto"
    profile: str = "release"
    bad: str = "error"
    max_bad_share: float = 0.01
    checkpoint: str = ""
    progress: bool = True

    def __post_init__(self):
        if not self.src or not self.dst:
            raise ValueError("got an empty path; wanted both --src and --dst")
        local_path.resolve_path(self.dst, "--dst")  # raises for a bucket
        if self.shards < 0:
            raise ValueError(f"--shards is {self.shards}; wanted at least 1, or 0 for 16 at most")
        modes = data_config.BAD_RECORD_MODES
        configlib.check_field(self.bad in modes, "--bad", self.bad, f"one of {', '.join(modes)}")
        is_share = 0 <= self.max_bad_share <= 1
        configlib.check_field(is_share, "--max_bad_share", self.max_bad_share, "a share, 0 to 1")


def run(config: PrepareConfig) -> pathlib.Path:
    """Write the shards, and return the finished directory.

    The directory's `prepare.json` holds the source's fingerprint, the number of records in each
    shard, and the errors of the records that were left out. With a tokenizer it also holds the
    number of tokens in each shard, and in the longest record of each.

    Raises:
      DataError: training could not use a record, or too many of them. The message names its file
        and line.
      FileExistsError: the destination exists, or an unfinished one has another source.
    """
    dst = local_path.resolve_path(config.dst, "--dst")
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
    config = dataclasses.replace(config, shards=config.shards or min(_DEFAULT_SHARDS, len(records)))
    if len(records) < config.shards:
        raise ValueError(f"--shards is {config.shards}; wanted at most the {len(records)} records")
    encoder = None
    if config.checkpoint:
        tokenizer = tokenizer_lib.Tokenizer.load(config.checkpoint)
        encoder = chat.RecordEncoder(tokenizer, profile=config.profile)
    _print_columns(config, records)
    manifest = _open_manifest(partial, config, records)
    with progress_bar.open_bar("prepare", len(records), "record", shown=config.progress) as bar:
        for shard in range(config.shards):
            name = f"{shard:05d}-of-{config.shards:05d}.arrayrecord"
            start, end = (len(records) * i // config.shards for i in (shard, shard + 1))
            # The manifest lists whole shards alone, so an interrupted shard is written again.
            if name not in manifest["shards"]:
                # Readers find shards by their suffix, which an unfinished one does not have.
                growing = partial / (name + ".tmp")
                writer = _ShardWriter(growing, config, encoder, manifest.get("bad_records", []))
                counts = writer.write(records, range(start, end), bar)
                # Readers refuse a file without records.
                if counts["records"]:
                    growing.rename(partial / name)
                else:
                    growing.unlink()
                manifest["shards"][name] = counts
                if writer.errors:
                    manifest["bad_records"] = writer.errors
                _write_manifest(partial / MANIFEST_FILE, manifest)
            else:
                bar.update(end - start)
    _report_bad_records(manifest, len(records))
    return partial


def _report_bad_records(manifest: dict[str, Any], num_records: int) -> None:
    """Print how many records were left out.

    Raises:
      DataError: all of them.
    """
    errors = manifest.get("bad_records", [])
    if len(errors) == num_records:
        raise records_lib.DataError(f"--src: all {num_records} records are bad: {errors[0]}")
    if errors:
        print(
            f"left out {len(errors)} of {num_records} records; {MANIFEST_FILE} lists them",
            file=sys.stderr,
        )


def _print_columns(config: PrepareConfig, records: records_lib.RecordFiles) -> None:
    """Print which columns of the first record are read."""
    try:
        description = columns.describe_columns(records.read(0), config.kind)
    except ValueError:  # told when its shard is written
        return
    find_files.print_once(f"--src: {description}")


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
    if config.bad == "error" and manifest.get("bad_records"):
        raise FileExistsError(
            f"{partial} is an interrupted preparation that left out "
            f"{len(manifest['bad_records'])} bad records. Go on with --bad=skip, or remove it."
        )
    return manifest


def _write_manifest(path: pathlib.Path, manifest: dict[str, Any]) -> None:
    durable.write_text_atomically(path, json.dumps(manifest, indent=1))


class _ShardWriter:
    """Writes one shard.

    Attributes:
      errors: errors of the records that were left out, of this shard and those before it.
    """

    def __init__(
        self,
        path: pathlib.Path,
        config: PrepareConfig,
        encoder: chat.RecordEncoder | None,
        earlier_errors: list[str],
    ):
        self._path, self._config, self._encoder = path, config, encoder
        self.errors = list(earlier_errors)

    def write(self, records: records_lib.RecordFiles, indices: range, bar) -> dict[str, int]:
        """Write the records of these indices and return the shard's counts."""
        counts = {"records": 0}
        if self._encoder is not None:
            counts |= {"tokens": 0, "longest_tokens": 0}
        # A reader decompresses a whole group for one record, hence groups of one.
        writer = array_record_module.ArrayRecordWriter(str(self._path), "group_size:1")
        try:
            for index in indices:
                try:
                    line, tokens = self._check_record(records, index)
                except data_errors.BadRecordError as error:
                    self._leave_out(error, index + 1, len(records))
                else:
                    writer.write(line)
                    counts["records"] += 1
                    if self._encoder is not None:
                        counts["tokens"] += tokens
                        counts["longest_tokens"] = max(counts["longest_tokens"], tokens)
                bar.update()
        finally:
            writer.close()
        return counts

    def _leave_out(
        self, error: data_errors.BadRecordError, num_read: int, num_records: int
    ) -> None:
        """Count a bad record, or raise its error."""
        if self._config.bad == "error":
            raise error
        self.errors.append(str(error))
        find_files.print_once(f"left out: {error}")
        max_share = self._config.max_bad_share
        data_errors.check_bad_share(
            "--src", len(self.errors), num_read, num_records, max_share, str(error)
        )

    def _check_record(self, records: records_lib.RecordFiles, index: int) -> tuple[bytes, int]:
        """Return a record as JSON, and its number of tokens, which is 0 without a tokenizer.

        Raises:
          BadRecordError: training cannot use the record.
        """
        tokens, profile = 0, self._config.profile
        record = records.read(index)
        try:
            content = columns.to_training_record(record, self._config.kind)
            if self._encoder is not None:
                tokens = len(self._encoder.encode(content).tokens)
            elif "messages" in content:
                # Rendered for its errors alone.
                chat.render_conversation(content["messages"], content.get("tools"), profile=profile)
            return json.dumps(content, ensure_ascii=False, allow_nan=False).encode(), tokens
        except ValueError as error:
            raise data_errors.bad_record(records.location(index), error) from None


def main(_) -> None:
    try:
        config = PrepareConfig(
            **{f.name: getattr(flags.FLAGS, f.name) for f in dataclasses.fields(PrepareConfig)}
        )
        print(f"wrote {run(config)}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _define_flags() -> None:
    with command_help.flag_group("Files"):
        flags.DEFINE_string("src", None, "File, directory or pattern to read.", required=True)
        flags.DEFINE_string("dst", None, "Directory to make; must not exist.", required=True)
        flags.DEFINE_integer("shards", 0, "How many files to write; 0: 16, or one a record.")
    with command_help.flag_group("Records"):
        flags.DEFINE_enum("kind", "auto", chat.RECORD_KINDS, "What every record must be.")
        flags.DEFINE_enum("profile", "release", chat.PROFILES, "Chat template.")
        modes = data_config.BAD_RECORD_MODES
        flags.DEFINE_enum("bad", "error", modes, "What becomes of records that cannot be used.")
        flags.DEFINE_float("max_bad_share", 0.01, "Most that --bad=skip leaves out, a share, 0-1.")
    with command_help.flag_group("Output"):
        text = "Directory with a tokenizer, to count tokens, too. Default: count records alone."
        flags.DEFINE_string("checkpoint", "", text)
        flags.DEFINE_bool("progress", True, "Show a progress bar.")


def cli() -> None:
    _define_flags()
    command_help.run_command(__doc__, main)


if __name__ == "__main__":
    cli()
