"""Records to token ids, and a mask of the tokens that the model learns.

All tokens of a text are learnt. Of a conversation the model learns what it writes itself: the
content of each assistant turn, with thinking and tool calls, and the token that ends the turn. It
learns neither a turn's head, which the sampler writes, nor any other turn. Heads are encoded apart
from contents, as they are when the model is sampled.

Thinking in conversations of several rounds has two modes:
  keep  The turns stand as recorded.
  drop  As clients send them: assistant turns before the last user message lose their <think>
        block. A turn that loses its block is read and not learnt, because its answer follows from
        thoughts that are not there. Turns after the last user message keep their blocks.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from infer import prompt
from m1_jax import tokenizer as tokenizer_lib
from train.data import packing

RECORD_KINDS = ("auto", "text", "chat")
OVERLONG_MODES = ("error", "drop", "split")
THINKING_MODES = ("keep", "drop")
PROFILES = prompt.PROFILES
# A block at the very beginning alone: an answer may quote the tags.
_THOUGHT_PATTERN = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)


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
          record: with `text`, or with `messages`.
          kind: one of `RECORD_KINDS`. "auto" goes by the record's keys.

        Raises:
          ValueError: the record is of neither kind, is empty or cannot be rendered.
        """
        return (
            self._encode_chat(record)
            if is_chat(record, kind)
            else self._encode_text(record["text"])
        )

    def encode_or_drop(self, record: dict, kind: str = "auto") -> packing.TokenizedDocument | None:
        """Return the document of `encode`, or None for a conversation to leave out as too long.

        Raises:
          ValueError: `encode` raised it, or a conversation is too long and `overlong` is "error".
        """
        document = self.encode(record, kind)
        length = len(document.tokens)
        # Texts are always split: a part of a text is a text.
        if length <= self.seq_len or self.overlong == "split" or not is_chat(record, kind):
            return document
        if self.overlong == "drop":
            return None
        raise ValueError(
            f"got a conversation of {length} tokens; wanted at most {self.seq_len}. "
            "Choose overlong='drop' or 'split', or longer rows."
        )

    def _encode_text(self, text: str) -> packing.TokenizedDocument:
        ids = self.tokenizer.encode(text)
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
    # Tables have all columns in all rows, so a key may be there with null.
    present_keys = {key for key in ("text", "messages") if record.get(key) is not None}
    kind_keys = {"text": {"text"}, "chat": {"messages"}, "auto": {"text", "messages"}}[kind]
    usable = present_keys & kind_keys
    if len(usable) != 1:
        raise ValueError(
            f"got the keys {sorted(record)}; wanted {' or '.join(sorted(kind_keys))}, not null"
            + (" and not both" if len(usable) > 1 else "")
        )
    if usable == {"messages"}:
        if not isinstance(record.get("tools"), list | None):
            raise ValueError(f"tools: got {record['tools']!r:.80}; wanted a list")
        return True
    if not isinstance(record["text"], str) or not record["text"]:
        raise ValueError(f"text: got {record['text']!r:.80}; wanted a string that is not empty")
    return False


def render_conversation(
    messages: Any, tools: Any = None, thinking: str = "keep", profile: str = "release"
) -> list[tuple[prompt.PromptPiece, bool]]:
    """Return the pieces of `prompt.render_prompt`, each with whether it is learnt.

    Raises:
      ValueError: the conversation cannot be rendered, or has no assistant turn to learn.
    """
    normalized = prompt.normalize_messages(messages, profile)
    turns_learnt = [True] * sum(message["role"] == "assistant" for message in normalized)
    if thinking == "drop":
        messages, turns_learnt = _drop_old_thoughts(normalized)
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
    """Return the messages, and for each assistant turn whether it is still to be learnt."""
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
    shortened, turns_learnt = [], []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            # Normalised messages of the assistant have one part, a text.
            text = message["content"][0]["text"]
            answer = _THOUGHT_PATTERN.sub("", text) if i < last_user else text
            turns_learnt.append(answer == text)
            message = {**message, "content": [{"type": "text", "text": answer}]}
        shortened.append(message)
    return shortened, turns_learnt
