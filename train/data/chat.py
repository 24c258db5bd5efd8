"""Records to token ids, and which of those tokens are to be learnt.

Text: all of them. Conversations: what the model writes itself, so of each assistant turn its
content (thinking and tool calls are part of it) and the token that ends the turn; not the turn's
head, which the sampler writes, nor any other turn. Heads are encoded apart from contents, as they
are when the model is sampled.

Thinking, in conversations of several rounds:
  keep  the turns stand as recorded.
  drop  as clients send them: assistant turns before the last user message lose their <think>
        block. Those that lose one are read and not learnt, as their answers follow from what is
        no longer there. The turns after the last user message keep theirs.
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
_THOUGHT_PATTERN = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class RecordEncoder:
    """Makes documents of records; the fields are those of `mixture.StreamConfig`."""

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
          kind: one of `RECORD_KINDS`; auto goes by the record's keys.

        Raises:
          ValueError: a record that is of neither kind, is empty or cannot be rendered.
        """
        return (
            self._encode_chat(record)
            if is_chat(record, kind)
            else self._encode_text(record["text"])
        )

    def encode_or_drop(self, record: dict, kind: str = "auto") -> packing.TokenizedDocument | None:
        """Return the document of `encode`, or None for a conversation to leave out as too long.

        Raises:
          ValueError: as `encode`, or a conversation that is too long.
        """
        document = self.encode(record, kind)
        length = len(document.tokens)
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
            ids.insert(0, self.tokenizer.special_token_id(self.begin_token))
        if self.end_token is not None:
            ids.append(self.tokenizer.special_token_id(self.end_token))
        return packing.TokenizedDocument(np.array(ids, np.int32), np.ones(len(ids), bool))

    def _encode_chat(self, record: dict) -> packing.TokenizedDocument:
        ids: list[int] = []
        learn: list[bool] = []
        pieces = render_conversation(
            record["messages"], record.get("tools"), self.thinking, self.profile
        )
        for piece, learnt in pieces:
            encode = self.tokenizer.special_token_id if piece.special else self.tokenizer.encode
            new = encode(piece.text)
            new = [new] if isinstance(new, int) else new
            ids += new
            learn += [learnt] * len(new)
        return packing.TokenizedDocument(np.array(ids, np.int32), np.array(learn, bool))


def is_chat(record: dict, kind: str = "auto") -> bool:
    """Return whether a record is a conversation.

    Raises:
      ValueError: it is not of the kind that it should be, or is empty.
    """
    have = {key for key in ("text", "messages") if record.get(key) is not None}
    wanted = {"text": {"text"}, "chat": {"messages"}, "auto": {"text", "messages"}}[kind]
    usable = have & wanted
    if len(usable) != 1:
        raise ValueError(
            f"got the keys {sorted(record)}; wanted {' or '.join(sorted(wanted))}, not null"
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
    """Return a conversation's pieces, as `prompt.render_prompt`, each with whether it is learnt.

    Raises:
      ValueError: a conversation that cannot be rendered, or has no assistant turn to learn.
    """
    normal = prompt.normalize_messages(messages, profile)
    learnt = [True] * sum(message["role"] == "assistant" for message in normal)
    if thinking == "drop":
        messages, learnt = _drop_old_thoughts(normal)
    if not any(learnt):
        raise ValueError("got no assistant turn to learn; wanted at least one")
    turns = iter(learnt)
    # The opened turn that a prompt ends with is the head of every assistant turn.
    head = prompt.render_prompt([{"role": "user", "content": "-"}], profile=profile)[-1].text
    pieces: list[tuple[prompt.PromptPiece, bool]] = []
    before, learning = "", False
    rendered = prompt.render_prompt(messages, tools, add_generation_prompt=False, profile=profile)
    for piece in rendered:
        if piece.special:
            pieces.append((piece, learning and piece.text == prompt.END_TOKEN))
            before, learning = piece.text, False
        elif before == prompt.BEGIN_TOKEN and piece.text.startswith(head):
            learning = next(turns)
            pieces.append((prompt.PromptPiece(head), False))
            pieces.append((prompt.PromptPiece(piece.text[len(head) :]), learning))
        else:
            pieces.append((piece, False))
    return pieces


def _drop_old_thoughts(messages: list[dict]) -> tuple[list[dict], list[bool]]:
    """Return the messages, and for each assistant turn whether it is still to be learnt."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
    kept, learnt = [], []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            text = message["content"][0]["text"]
            rest = _THOUGHT_PATTERN.sub("", text) if i < last else text
            learnt.append(rest == text)
            message = {**message, "content": [{"type": "text", "text": rest}]}
        kept.append(message)
    return kept, learnt
