"""Which files a path stands for: a file, a folder with all below it, or a pattern; local or remote.

A file's format is in its name, in small or capital letters: `.jsonl`, `.ndjson`, `.json`,
`.parquet`, `.arrayrecord`. `.gz` or `.zst` may follow the first three.
"""

import glob
import os
import sys

import tqdm
from etils import epath

from train.data import data_errors

JSON_FORMATS = ("jsonl", "ndjson", "json")
_FORMATS = {
    **{f".{name}": name for name in JSON_FORMATS},
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
}
# Names of the codecs are pyarrow's.
_CODECS = {".gz": "gzip", ".zst": "zstd"}
# JSON that tools put beside data: the manifest of `train.prepare`, and those of Hugging Face.
_METADATA_NAMES = frozenset(
    {"prepare.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
_FIRST_SUFFIXES = (".jsonl", ".parquet", ".arrayrecord", ".array_record")
_WILDCARDS = "*?["
_REMOTE_SCHEMES = ("gs", "s3", "az", "hf")
_MAX_NAMED = 5  # files left out that an error names. The printed line names all of them


def find_files(source: str, path: str) -> list[epath.Path]:
    """Return the files of a path, sorted by name.

    Of a folder these are all files below it with a known suffix. The others are left out, and one
    printed line names each of them.

    Args:
      source: name of the source, for messages.
      path: a file, a folder or a pattern, such as gs://bucket/books/*.arrayrecord. `**` stands for
        any folders of a local path, and `~` for the home folder.

    Raises:
      NoFilesError: there is no file, or no access to remote storage.
      DataError: a file of an unknown format, or a path of a form that cannot be read.
    """
    scheme, is_url, _ = path.partition("://")
    if is_url and scheme not in _REMOTE_SCHEMES:
        raise data_errors.DataError(
            f"source {source!r}: got {path}; wanted a local path or one of "
            f"{', '.join(f'{name}://' for name in _REMOTE_SCHEMES)}. Download the files first."
        )
    try:
        files, left_out = _list_files(source, path if is_url else os.path.expanduser(path))
    except ImportError as error:
        extra = "pip install 'm1-jax[gcs]'" if scheme == "gs" else f"install {error.name or error}"
        reason = data_errors.shorten_reason(error)
        raise data_errors.NoFilesError(
            f"source {source!r}: got {path}, which needs another package ({reason}): {extra}"
        ) from None
    except OSError as error:
        reason = data_errors.shorten_reason(error)
        kind = data_errors.NoFilesError if is_url else data_errors.DataError
        raise kind(f"source {source!r}: got {path}: {reason}") from None
    if not files:
        names = ", ".join(left_out[:_MAX_NAMED])
        others = f", and not {names}" if left_out else ""
        raise data_errors.NoFilesError(
            f"source {source!r}: got {path}, where there is no file; wanted {_describe_formats()}"
            f"{others}"
        )
    if left_out:
        print_once(f"source {source!r}: leaves out {', '.join(dict.fromkeys(left_out))}")
    # A pattern such as data/** stands for a folder and for the files in it.
    return sorted({str(file): file for file in files}.values(), key=str)


def find_format(file: epath.Path) -> tuple[str, str | None] | None:
    """Return a file's format and the codec that compressed it or None, by its name alone.

    The result is None for a name that stands for no format.
    """
    name = file.name.lower()
    stem, suffix = os.path.splitext(name)
    codec = _CODECS.get(suffix)
    if codec is not None:
        suffix = os.path.splitext(stem)[1]
    file_format = _FORMATS.get(suffix)
    if file_format is None or (codec is not None and file_format not in JSON_FORMATS):
        return None
    return file_format, codec


def is_added_kind(path: str, file: epath.Path) -> bool:
    """Return whether earlier versions left out a file of a path, so that their states lack it.

    They read no folders within a folder, and `_FIRST_SUFFIXES` alone.
    """
    folder = epath.Path(path if "://" in path else os.path.expanduser(path))
    is_below = folder.is_dir() and file.parent != folder
    return is_below or file.suffix not in _FIRST_SUFFIXES


_printed_lines: set[str] = set()


def print_once(line: str) -> None:
    """Print a line to the standard error, once a process: runs open a source many times."""
    if line not in _printed_lines:
        _printed_lines.add(line)
        tqdm.tqdm.write(line, file=sys.stderr)


def _list_files(source: str, path: str) -> tuple[list[epath.Path], list[str]]:
    """Return the files of a path, and the names of those that a folder has beside them."""
    root = epath.Path(path)
    # A name may have brackets, so what exists is no pattern.
    if root.is_dir():
        return _walk_folder(root)
    if root.exists():
        matches = [root]
    elif any(char in path for char in _WILDCARDS):
        matches = _match_pattern(source, path)
    else:
        return [], []
    files, left_out = [], []
    for match in matches:
        if match.is_dir():
            inner_files, inner_left_out = _walk_folder(match)
            files += inner_files
            left_out += inner_left_out
        elif find_format(match) is None:
            raise data_errors.DataError(
                f"{match}: got a file of another kind; wanted {_describe_formats()}"
            )
        else:
            files.append(match)
    return files, left_out


def _match_pattern(source: str, path: str) -> list[epath.Path]:
    if "://" not in path:
        return [epath.Path(match) for match in glob.glob(path, recursive=True)]
    parts = epath.Path(path).parts
    # A glob starts in a folder that is certain to exist: the parts before the first wildcard.
    first_wild = next(i for i, part in enumerate(parts) if any(c in part for c in _WILDCARDS))
    if "**" in parts:
        raise data_errors.DataError(
            f"source {source!r}: got {path}; wanted no ** in a remote path. Give the folder above "
            "it, which is read with all below it."
        )
    return list(epath.Path(*parts[:first_wild]).glob("/".join(parts[first_wild:])))


def _walk_folder(folder: epath.Path) -> tuple[list[epath.Path], list[str]]:
    """Return the files of records below a folder, and the names of what is left out.

    Left out are hidden files and folders, names of an unknown format, metadata by its usual names,
    and the compressed copy of a file that is there as well.
    """
    files: list[epath.Path] = []
    left_out: list[str] = []
    folders, visited = [folder], set()
    while folders:
        parent = folders.pop()
        # A link may lead to a folder above.
        real_path = str(parent) if "://" in str(parent) else os.path.realpath(parent)
        if real_path in visited:
            continue
        visited.add(real_path)
        entries = sorted(parent.iterdir(), key=str)
        names = {entry.name for entry in entries}
        for entry in entries:
            if entry.name.startswith("."):
                left_out.append(str(entry.relative_to(folder)))
            elif entry.is_dir():
                folders.append(entry)
            elif _is_record_file(entry, names):
                files.append(entry)
            else:
                left_out.append(str(entry.relative_to(folder)))
    return files, sorted(left_out)


def _is_record_file(file: epath.Path, names: set[str]) -> bool:
    """Return whether a file of a folder, which has these names, is read."""
    file_format = find_format(file)
    if file_format is None or file.name in _METADATA_NAMES:
        return False
    return file_format[1] is None or os.path.splitext(file.name)[0] not in names


def _describe_formats() -> str:
    compressed = ", ".join(f".{name}" for name in JSON_FORMATS)
    others = ", ".join(suffix for suffix in _FORMATS if suffix.strip(".") not in JSON_FORMATS)
    return f"files ending in {compressed} (or these and {' or '.join(_CODECS)}), {others}"
