"""Text to token ids and back, over the `tokenizers` library, without transformers.

This module guarantees two properties that the library alone does not have:
  * Text never becomes a control token. `encode` spells out a typed `<end_of_sentence>` unless the
    caller allows special tokens, whatever flags tokenizer.json gives that token.
  * Bytes are exact. A token is a byte string, so text streamed token by token equals the text of
    all tokens at once, even if a character spans several tokens.
"""

import codecs
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers

from m1_jax import json_file, local_path, missing_directory, strict_json

# Marks of the chat template. tokenizer.json may flag them as ordinary added tokens, which the
# library recognises in any text.
STRUCTURE_TOKENS = (
    "<begin_of_document>",
    "<end_of_document>",
    "<beginning_of_sentence>",
    "<end_of_sentence>",
)
_DEFAULT_EOS_TOKEN = "<end_of_sentence>"
_TOKEN_ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")  # keys "{role}_token"
_MAX_ID = 2**31 - 1  # ids are int32 on devices
_UNKNOWN_ID_BYTES = "\ufffd".encode()  # of an id that only the model's padded vocabulary has


class Tokenizer:
    """A byte-level BPE tokenizer as the release ships it, made by `Tokenizer.load`.

    Control tokens are the added tokens marked special, those that tokenizer_config.json names, and
    `STRUCTURE_TOKENS`. Other added tokens are text and are matched in text.

    Attributes:
      vocab_size: highest id + 1. The model's vocabulary may be padded beyond it.
      stop_ids: ids that end a generation, ascending, those of all companion files together. The
        release has one, 200020.
    """

    def __init__(self, library: tokenizers.Tokenizer, settings: dict, eos_ids: Iterable[int] = ()):
        self._library = library
        self._vocab = library.get_vocab(with_added_tokens=True)
        # Not the number of tokens, since ids may have gaps.
        self.vocab_size = max(self._vocab.values()) + 1
        self._control_token_ids = self._mark_control_tokens(settings)
        # A regular expression takes the first alternative that matches, so a name must come before
        # its prefixes.
        longest_first = sorted(self._control_token_ids, key=len, reverse=True)
        # (?!) matches nothing, for a tokenizer without control tokens.
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        added = {i: token.content for i, token in library.get_added_tokens_decoder().items()}
        self._added_bytes = {i: content.encode() for i, content in added.items()}
        self._control_id_set = frozenset(self._control_token_ids.values())
        self.stop_ids = tuple(sorted({*eos_ids, *self._find_eos_token(settings)}))

    @classmethod
    def load(cls, directory) -> "Tokenizer":
        """Read a checkpoint directory's tokenizer.json and, where present, its companions.

        tokenizer_config.json names bos, eos and unk. generation_config.json and config.json may add
        eos ids.

        Raises:
          FileNotFoundError: no directory, or no tokenizer.json in it.
          ValueError: a damaged file, a tokenizer that is not byte-level, an eos token that
            tokenizer.json does not hold, or a path that is not of this machine.
        """
        path = local_path.resolve_path(directory) / "tokenizer.json"
        if problem := missing_directory.describe_missing_directory(path.parent):
            raise FileNotFoundError(f"{path.parent} {problem}")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; wanted the release's tokenizer. Copy tokenizer.json and "
                "tokenizer_config.json from the release into that directory."
            )
        library = _read_library(path)
        # tokenizer.json may ask for both, but ids must stand for all of the text and nothing else.
        library.no_truncation()
        library.no_padding()
        folder = path.parent
        eos_ids = {
            *_read_eos_ids(folder / "generation_config.json"),
            *_read_eos_ids(folder / "config.json"),
        }
        return cls(library, _read_companion(folder / "tokenizer_config.json"), eos_ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash of all that decides which ids a text becomes."""
        return hashlib.sha256(self._library.to_str().encode()).hexdigest()

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the ids of `text`, without a token at its beginning or end.

        Args:
          text: any text that UTF-8 can hold.
          allow_special: read the names of control tokens in the text as those tokens. It is only
            for text whose author may control the model, never for text that a user typed.

        Raises:
          ValueError: text that UTF-8 cannot hold (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text: got a lone surrogate {text[error.start]!r} at character {error.start}; "
                "wanted valid Unicode"
            ) from None
        if not allow_special:
            return self._encode_text(text)
        ids: list[int] = []
        start = 0
        # The library spells out control tokens, so they are cut out before it sees the text.
        for match in self._control_pattern.finditer(text):
            ids += self._encode_text(text[start : match.start()])
            ids.append(self._control_token_ids[match.group()])
            start = match.end()
        return ids + self._encode_text(text[start:])

    def special_token_id(self, name: str) -> int:
        """Return the id of the added token `name`, e.g. `<end_of_sentence>`.

        Raises:
          ValueError: the tokenizer has no such added token.
        """
        token_id = self._vocab.get(name)
        if token_id is None or token_id not in self._added_bytes:
            names = sorted(content.decode() for content in self._added_bytes.values())
            raise ValueError(
                f"special token: got {name!r}; this tokenizer.json has {', '.join(names[:12])}"
                f"{', ...' if len(names) > 12 else ''}. Is it the release's tokenizer?"
            )
        return token_id

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """Return the bytes of one token, none for a control token if it is to be skipped.

        An id that the tokenizer does not know gives U+FFFD, because models pad their vocabulary.

        Raises:
          ValueError: a negative id.
        """
        token_id = int(token_id)  # it may be a number of numpy or JAX
        if token_id < 0:
            raise ValueError(f"token id: got {token_id}; wanted 0 or more")
        if token_id in self._control_id_set and skip_special:
            return b""
        if token_id in self._added_bytes:
            return self._added_bytes[token_id]
        token = self._library.id_to_token(token_id)
        if token is None:
            return _UNKNOWN_ID_BYTES
        try:
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        except KeyError:
            # The token is not spelled in the byte alphabet, so it stands for its own characters.
            return token.encode()

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of `ids`. Bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode(errors="replace")

    def decoder(self, skip_special: bool = True) -> "StreamDecoder":
        """Return a fresh decoder for one stream of ids."""
        return StreamDecoder(self, skip_special)

    def _mark_control_tokens(self, settings: dict) -> dict[str, int]:
        """Make the library spell out every control token, and return their ids by name."""
        names = {t.content for t in self._library.get_added_tokens_decoder().values() if t.special}
        names |= {
            name
            for name in (*STRUCTURE_TOKENS, *_iterate_token_names(settings))
            if name in self._vocab
        }
        # Tokens that exist keep their ids. Sorted, since the order of a set is not deterministic.
        control_tokens = [
            tokenizers.AddedToken(n, special=True, normalized=False) for n in sorted(names)
        ]
        self._library.add_special_tokens(control_tokens)
        # In the library this means: encode the characters of a special token's name, not the token.
        self._library.encode_special_tokens = True
        return {name: self._vocab[name] for name in names}

    def _encode_text(self, text: str) -> list[int]:
        """Return the ids of `text`, none of which is a control token."""
        ids = self._library.encode(text, add_special_tokens=False).ids
        if self._control_id_set.isdisjoint(ids):
            return ids
        # A tokenizer that looks up whole words in its vocabulary (ignore_merges) may still find a
        # control token. Its name is cut after the first character, so that no part spells it.
        ids = []
        for part in self._split_control_names(text):
            ids += self._library.encode(part, add_special_tokens=False).ids
        if not self._control_id_set.isdisjoint(ids):
            raise ValueError(
                f"text: this tokenizer can spell {text[:60]!r} only with control tokens; wanted "
                "ordinary tokens. Is it the release's tokenizer?"
            )
        return ids

    def _split_control_names(self, text: str) -> Iterator[str]:
        """Yield the text in parts, each control token's name cut after its first character."""
        start = 0
        # The search goes on inside the name, because another name may begin there.
        while match := self._control_pattern.search(text, start):
            yield text[start : match.start() + 1]
            start = match.start() + 1
        yield text[start:]

    def _find_eos_token(self, settings: dict) -> list[int]:
        """Return the id of tokenizer_config.json's eos token, none if there is no such token."""
        name = _parse_token_name(settings.get("eos_token"))
        if name is None:
            name = _DEFAULT_EOS_TOKEN if _DEFAULT_EOS_TOKEN in self._vocab else None
        elif name not in self._vocab:
            raise ValueError(
                f"tokenizer_config.json: got eos_token {strict_json.show_value(name)}, which "
                "tokenizer.json does not hold; wanted files of one release. Copy both again."
            )
        return [] if name is None else [self._vocab[name]]


class StreamDecoder:
    """Turns ids into text one at a time. A character is returned with its last byte.

    The results of all `push` calls and of `flush`, joined, equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        # This decoder keeps the bytes of an unfinished character until the next bytes arrive.
        self._utf8_decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that this token completes, often empty inside a character."""
        return self._utf8_decoder.decode(self._tokenizer.token_bytes(token_id, self._skip_special))

    def flush(self) -> str:
        """End the stream: return U+FFFD for an unfinished character, and start anew."""
        text = self._utf8_decoder.decode(b"", final=True)
        self._utf8_decoder.reset()
        return text


def _make_byte_alphabet() -> dict[str, int]:
    """Return the byte-level alphabet: the byte that each character of a token's name stands for.

    Printable bytes of Latin-1 are their own characters. The other bytes, in their order, are the
    characters from U+0100 on, as in GPT-2.
    """
    printable_bytes = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other_bytes = [byte for byte in range(256) if byte not in printable_bytes]
    shifted_alphabet = {chr(0x100 + offset): byte for offset, byte in enumerate(other_bytes)}
    return {chr(byte): byte for byte in printable_bytes} | shifted_alphabet


_BYTE_OF_CHAR = _make_byte_alphabet()


def _read_library(path: pathlib.Path) -> tokenizers.Tokenizer:
    """Return the byte-level tokenizer of a tokenizer.json, which has at least one token."""
    content = json_file.read_json_object(path, ValueError)
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        reason = strict_json.shorten_text(str(error), 120)
        raise ValueError(f"{path}: not a tokenizer: {reason}. Copy it again.") from None
    if not isinstance(library.decoder, tokenizers.decoders.ByteLevel):
        decoder = strict_json.show_value(library.decoder)
        raise ValueError(f"{path}: got decoder {decoder}; wanted ByteLevel, as the release has")
    if not library.get_vocab_size(with_added_tokens=True):
        raise ValueError(f"{path}: got a tokenizer without tokens. Copy it again.")
    return library


def _read_companion(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object of a file, or an empty one if the file does not exist."""
    # A link to nothing is there, too.
    return json_file.read_json_object(path, ValueError) if os.path.lexists(path) else {}


def _read_eos_ids(path: pathlib.Path) -> list[int]:
    """Return the ids of a file's eos_token_id, which is an id, a list of ids, or null."""
    eos_ids = _read_companion(path).get("eos_token_id")
    if not isinstance(eos_ids, list):
        eos_ids = [] if eos_ids is None else [eos_ids]
    for eos_id in eos_ids:
        # JSON's true would be the id 1.
        is_id = isinstance(eos_id, int) and not isinstance(eos_id, bool)
        if not is_id or not 0 <= eos_id <= _MAX_ID:
            raise ValueError(
                f"{path.name}: eos_token_id: got {strict_json.show_value(eos_id)}; wanted an id"
            )
    return eos_ids


def _parse_token_name(token: Any) -> str | None:
    """Return the name in a token entry, which is a string or an object with `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        shown = strict_json.show_value(token)
        raise ValueError(f"tokenizer_config.json: got the token {shown}; wanted a string")
    return token


def _iterate_token_names(settings: dict) -> Iterator[str]:
    """Yield the names of the special tokens that tokenizer_config.json gives a role."""
    additional_tokens = settings.get("additional_special_tokens") or []
    if not isinstance(additional_tokens, list):
        shown = strict_json.show_value(additional_tokens)
        raise ValueError(
            f"tokenizer_config.json: got additional_special_tokens {shown}; wanted a list"
        )
    for token in (*(settings.get(f"{role}_token") for role in _TOKEN_ROLES), *additional_tokens):
        name = _parse_token_name(token)
        if name is not None:
            yield name
