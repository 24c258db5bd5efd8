"""Records to token ids, and a mask of the tokens that the model learns.

All tokens of a text are learnt. Of a conversation the model learns what it writes itself: the
content of each assistant turn, with thinking and tool calls, and the token that ends the turn. A
turn with `weight`, `loss` or `train` of 0 is read and not learnt. The model learns neither a turn's
head, which the sampler writes, nor any other turn. Heads are encoded apart from contents, as they
are when the model is sampled.

Thinking in conversations of several rounds has two modes:
  keep  The turns stand as recorded.
  drop  As clients send them: assistant turns before the last user message lose their <think>
        block. A turn that loses its block is read and not learnt, because its answer follows from
        thoughts that are not there. Turns after the last user message keep their blocks.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from infer import prompt
from m1_jax import tokenizer as tokenizer_lib
from train.data import columns, packing

RECORD_KINDS = ("auto", "text", "chat")
OVERLONG_MODES = ("error", "drop", "split")
THINKING_MODES = ("keep", "drop")
PROFILES = prompt.PROFILES
_LINE_PATTERN = re.compile(r"\n(?=[^\W\d_])")  # the end of a line before a letter
_MAX_ENCODED_CHARS = 2**20  # of a text are encoded at once
_CUT_CONTEXT = 200  # characters on each side of a cut whose ids are compared
_MAX_CUTS_TRIED = 100
# A block at the very beginning alone: an answer may quote the tags.
_THOUGHT_PATTERN = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)


class OverlongError(ValueError):
    """A conversation is longer than a row, and `overlong` is "error"."""


@dataclasses.dataclass(frozen=True)
class RecordEncoder:
    """Makes documents of records.

    Attributes:
      tokenizer: the model's tokenizer.
      seq_len: tokens in a row, the longest conversation that `encode_or_drop` takes whole.
      overlong: what becomes of longer conversations, see `config.DataConfig`.
      thinking: one of `THINKING_MODES`.
      profile: profile of the chat template, one of `PROFILES`.
      begin_token: control token before each text, or None.
      end_token: control token after each text, or None.
    """

    tokenizer: tokenizer_lib.Tokenizer
    seq_len: int = 0
    overlong: str = "error"
    thinking: str = "keep"
    profile: str = "release"
    begin_token: str | None = prompt.DOCUMENT_TOKEN
    end_token: str | None = "<end_of_document>"

    def encode(self, record: dict, kind: str = "auto") -> packing.TokenizedDocument:
        """Return a record's document, whatever its length.

        Args:
          record: columns of one of the forms in `columns`.
          kind: one of `RECORD_KINDS`. "auto" goes by the record's keys.

        Raises:
          ValueError: the record is of neither kind, is empty or cannot be rendered.
        """
        record = columns.to_training_record(record, kind)
        return self._encode_chat(record) if "messages" in record else self._encode_text(record)

    def encode_or_drop(self, record: dict, kind: str = "auto") -> packing.TokenizedDocument | None:
        """Return the document of `encode`, or None for a conversation to leave out as too long.

        Raises:
          OverlongError: a conversation is too long, and `overlong` is "error".
          ValueError: see `encode`.
        """
        document = self.encode(record, kind)
        length = len(document.tokens)
        # Texts are always split: a part of a text is a text.
        if length <= self.seq_len or self.overlong == "split" or not is_chat(record, kind):
            return document
        if self.overlong == "drop":
            return None
        raise OverlongError(
            f"got a conversation of {length} tokens; wanted at most {self.seq_len}. "
            "Choose overlong='drop' or 'split', or longer rows."
        )

    def _encode_text(self, record: dict) -> packing.TokenizedDocument:
        ids: list[int] = []
        for part in split_text(self.tokenizer, record["text"]):
            ids += self.tokenizer.encode(part)
        if self.begin_token is not None:
            # By name, as text never becomes a control token.
            ids.insert(0, self.tokenizer.special_token_id(self.begin_token))
        if self.end_token is not None:
            ids.append(self.tokenizer.special_token_id(self.end_token))
        # The first token counts as well. Nothing predicts it, so the packer gives it no weight.
        return packing.TokenizedDocument(np.array(ids, np.int32), np.ones(len(ids), bool))

    def _encode_chat(self, record: dict) -> packing.TokenizedDocument:
        ids: list[int] = []
        loss_mask: list[bool] = []
        pieces = render_conversation(
            record["messages"], record.get("tools"), self.thinking, self.profile
        )
        for prompt_piece, learnt in pieces:
            special = prompt_piece.special
            encode = self.tokenizer.special_token_id if special else self.tokenizer.encode
            encoded = encode(prompt_piece.text)
            piece_ids = [encoded] if isinstance(encoded, int) else encoded
            ids += piece_ids
            loss_mask += [learnt] * len(piece_ids)
        return packing.TokenizedDocument(np.array(ids, np.int32), np.array(loss_mask, bool))


def is_chat(record: dict, kind: str = "auto") -> bool:
    """Return whether a record is a conversation.

    Raises:
      ValueError: the record is empty or of another kind than `kind`.
    """
    return columns.find_form(record, kind).convert is not None


def split_text(tokenizer: tokenizer_lib.Tokenizer, text: str) -> Iterator[str]:
    """Yield parts of a text whose ids together are those of the text.

    The library takes 220 bytes of memory for a byte of text until it returns. A cut lies between
    the end of a line and a letter. It is made where the ids of the text around it do not change.
    """
    start = 0
    while len(text) - start > _MAX_ENCODED_CHARS:
        end = _find_cut(tokenizer, text, start)
        if end is None:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def _find_cut(tokenizer: tokenizer_lib.Tokenizer, text: str, start: int) -> int | None:
    """Return a character of the text to cut before, None where there is none."""
    search_end = start + _MAX_ENCODED_CHARS
    for match in itertools.islice(_LINE_PATTERN.finditer(text, search_end), _MAX_CUTS_TRIED):
        cut = match.end()
        head, tail = text[max(start, cut - _CUT_CONTEXT) : cut], text[cut : cut + _CUT_CONTEXT]
        if tokenizer.encode(head + tail) == tokenizer.encode(head) + tokenizer.encode(tail):
            return cut
    return None


def render_conversation(
    messages: Any, tools: Any = None, thinking: str = "keep", profile: str = "release"
) -> list[tuple[prompt.PromptPiece, bool]]:
    """Return the pieces of `prompt.render_prompt`, each with whether it is learnt.

    Raises:
      ValueError: the conversation cannot be rendered, or has no assistant turn to learn.
    """
    turns_learnt: list[bool] = []
    if isinstance(messages, list | tuple):  # the prompt refuses anything else
        messages, turns_learnt = columns.split_loss(messages)
    normalized = prompt.normalize_messages(messages, profile)
    if thinking == "drop":
        messages, whole_turns = _drop_old_thoughts(normalized)
        turns_learnt = [a and b for a, b in zip(turns_learnt, whole_turns, strict=True)]
    if not any(turns_learnt):
        raise ValueError("got no assistant turn to learn; wanted at least one")
    next_turn_learnt = iter(turns_learnt)
    # The opened turn that a prompt ends with is the head of every assistant turn.
    head = prompt.render_prompt([{"role": "user", "content": "-"}], profile=profile)[-1].text
    pieces: list[tuple[prompt.PromptPiece, bool]] = []
    # `learning` is whether the turn that is under way is learnt. Its end token is, too.
    last_special, learning = "", False
    rendered = prompt.render_prompt(messages, tools, add_generation_prompt=False, profile=profile)
    for rendered_piece in rendered:
        if rendered_piece.special:
            # The end token is learnt: without it the model would not learn to stop.
            pieces.append((rendered_piece, learning and rendered_piece.text == prompt.END_TOKEN))
            last_special, learning = rendered_piece.text, False
        elif last_special == prompt.BEGIN_TOKEN and rendered_piece.text.startswith(head):
            learning = next(next_turn_learnt)
            # Two pieces, so that no token spans head and content.
            pieces.append((prompt.PromptPiece(head), False))
            pieces.append((prompt.PromptPiece(rendered_piece.text[len(head) :]), learning))
        else:
            pieces.append((rendered_piece, False))
    return pieces


def _drop_old_thoughts(messages: list[dict]) -> tuple[list[dict], list[bool]]:
    """Return the messages, and for each assistant turn whether it has lost no thoughts."""
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
    shortened, whole_turns = [], []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            # Normalised messages of the assistant have one part, a text.
            text = message["content"][0]["text"]
            answer = _THOUGHT_PATTERN.sub("", text) if i < last_user else text
            whole_turns.append(answer == text)
            message = {**message, "content": [{"type": "text", "text": answer}]}
        shortened.append(message)
    return shortened, whole_turns
