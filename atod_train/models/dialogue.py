"""Encode messages as the token ids that are fed to the model before each completion.

In chat style an episode is one growing sequence of tokens,

    prompt_0 + completion_0 + continuation_1 + completion_1 + continuation_2 + ...

in which completions stay exactly as sampled: encoding a decoded completion may give different
tokens. In window style every turn has its own prompt.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from atod_gym.errors import AtodError
from atod_gym.types import Message
from atod_train.config import parse_prompt_style
from atod_train.records import FinishReason

# Messages that probe the chat template; words that no template contains itself.
_USERS = tuple(Message("user", word) for word in ("Aqzuser", "Bqzuser", "Cqzuser"))
_REPLIES = tuple(Message("assistant", word) for word in ("Dqzreply", "Eqzreply"))

_MARK = "\ue083"
"""A character of the private use area; it is removed from messages."""

_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
TEMPLATE_DATE = datetime(2024, 7, 26)
"""Date for chat templates with a date; `template_options` can set another one."""

_NO_THOUGHTS = ("enable_thinking", False)
"""The option of the presets of published runs, which are for any model."""

_REWRITES = (
    "The chat template of this tokenizer does not only append: it renders earlier turns "
    "differently once later ones follow ({}). Use prompt_style='window', or give the tokenizer an "
    "append-only chat_template."
)


class DialogueEncoder:
    """Encodes the messages of an episode with the chat template of a tokenizer.

    Messages are text: a control token such as `<|im_end|>` in a passage or a product's title is
    encoded as its characters, never as the token. Templates that show the date get a fixed one
    (`TEMPLATE_DATE`), so that a run gives the same prompts on every day.

    Args:
        tokenizer: A tokenizer with a chat template.
        style: As `EnvConfig.prompt_style`: append-only, or a full prompt each turn.
        template_options: Further variables for the chat template, such as
            `{"enable_thinking": False}`.

    Attributes:
        end_of_turn_id: The token with which the template closes an assistant message.
        stop_ids: Tokens that end a completion: `end_of_turn_id` and the tokenizer's eos token.
        opens_thought: Whether the generation prompt ends in an open `<think>`.

    Raises:
        AtodError: No chat template; a template that closes assistant messages with no special
            token; an option that the template does not have; in chat style, a template that is not
            append-only.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        style: str = "chat",
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise AtodError(
                "The tokenizer has no chat template. Use an instruction-tuned model, or set "
                "tokenizer.chat_template."
            )
        self.tokenizer = tokenizer
        self.style, _ = parse_prompt_style(style)
        self._options = dict(template_options or {})
        for name, value in self._options.items():
            is_met = (name, value) == _NO_THOUGHTS  # by a template without thoughts
            if not is_met and not re.search(
                rf"\b{re.escape(name)}\b", tokenizer.get_chat_template()
            ):
                raise AtodError(
                    f"The chat template has no variable {name!r}, so env.template_options {name} "
                    f"{value} would change nothing. Correct its name, or leave it out."
                )
        self._template = _DATE.sub(
            lambda asked: repr(TEMPLATE_DATE.strftime(asked[2])), tokenizer.get_chat_template()
        )
        # Environments often repeat their observations.
        self._continuation = lru_cache(50_000)(self._encode_continuation)
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        longest_first = sorted(map(re.escape, special - {""}), key=len, reverse=True)
        self._control = re.compile("|".join(longest_first) or "(?!)")
        self.end_of_turn_id = self._find_end_of_turn()
        self.stop_ids = frozenset({self.end_of_turn_id, tokenizer.eos_token_id}) - {None}
        opening = self._render(_USERS[:1], generate=True).rpartition(_USERS[0].content)[2]
        self.opens_thought = opening.rfind("<think>") > opening.rfind("</think>")
        if self.style == "chat":
            self._check_append_only()

    def first(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a whole prompt, up to and including the generation prompt."""
        return self._encode(self._render(messages, generate=True))

    def continuation(
        self, messages: Sequence[Message], previous_finish_reason: FinishReason
    ) -> list[int]:
        """Return the ids between the previous completion and the next one (chat style).

        Args:
            messages: The messages that are new in this turn.
            previous_finish_reason: "stop" if the previous completion contains its end-of-turn
                token; else that token comes first here.

        Returns:
            Ids up to and including the next generation prompt.
        """
        if self.style != "chat":
            raise AtodError("Only chat style has continuations; in window style call first().")
        ids = self._continuation(tuple(messages))
        return list(ids[1:] if previous_finish_reason == "stop" else ids)

    def _encode_continuation(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        """Return the ids from the end-of-turn token of the previous completion on."""
        ids = self._after_reply(messages)
        if not ids or ids[0] != self.end_of_turn_id:
            raise AtodError(_REWRITES.format("an assistant message lost its text or its end"))
        return tuple(ids)

    def finished(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a dialogue whose last message is an assistant's, closed.

        All of it is encoded: completions get the tokenizer's own segmentation.
        """
        return self._encode(self._render(messages, generate=False))

    def completion(self, text: str) -> list[int]:
        """Return the ids of a completion that was not sampled, such as an expert's, closed."""
        return [*self._encode(self._escape(text)), self.end_of_turn_id]

    def decode(self, completion_ids: Sequence[int]) -> str:
        """Return the text of a completion without its end-of-turn token.

        Other special tokens stay visible.
        """
        ids = list(completion_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        assert isinstance(text, str)
        return text

    def _render(self, messages: Sequence[Message], *, generate: bool) -> str:
        """Return the text of a dialogue; control tokens in its messages are escaped."""
        text = self.tokenizer.apply_chat_template(
            [{"role": m.role, "content": self._escape(m.content)} for m in messages],
            tokenize=False,
            chat_template=self._template,
            add_generation_prompt=generate,
            **self._options,
        )
        assert isinstance(text, str)
        return text

    def _escape(self, text: str) -> str:
        """Replace every control token in a text by its code points between two marks."""
        return self._control.sub(
            lambda found: f"{_MARK}{' '.join(str(ord(c)) for c in found[0])}{_MARK}",
            text.replace(_MARK, ""),
        )

    def _encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text; escaped control tokens are encoded as characters."""
        # The template writes the special tokens itself.
        ids: list[int] = []
        for number, part in enumerate(text.split(_MARK)):
            if number % 2 == 0:
                ids += self.tokenizer.encode(part, add_special_tokens=False)
            else:
                characters = "".join(chr(int(code)) for code in part.split())
                ids += self._text_tokenizer.encode(characters, add_special_tokens=False).ids
        return ids

    @cached_property
    def _text_tokenizer(self) -> Any:
        """A tokenizer that encodes control tokens as their characters.

        A copy, because threads that use the tokenizer must not see a changed setting.
        """
        copied = copy.deepcopy(self.tokenizer.backend_tokenizer)
        copied.encode_special_tokens = True
        return copied

    def _after_reply(self, messages: tuple[Message, ...] = ()) -> list[int]:
        """Return the ids after an assistant's reply, including those of further messages."""
        dialogue = (_USERS[0], _REPLIES[0], *messages)
        rendered = self._render(dialogue, generate=bool(messages))
        return self._encode(rendered.partition(_REPLIES[0].content)[2].lstrip())

    def _find_end_of_turn(self) -> int:
        ids = self._after_reply()
        if not ids or ids[0] not in self.tokenizer.added_tokens_decoder:
            raise AtodError(
                "The chat template closes an assistant message with "
                f"{self.tokenizer.decode(ids)!r}, which does not start with a special token: a "
                "completion could not be ended. Use a tokenizer whose template has an end-of-turn "
                "token."
            )
        return ids[0]

    def _check_append_only(self) -> None:
        """Compare renderings of a dialogue of one, two and three user messages."""
        dialogue = [_USERS[0]]
        prompts = [self._render(dialogue, generate=True)]
        continuations = set()
        for reply, user in zip(_REPLIES, _USERS[1:], strict=True):
            dialogue += [reply, user]
            prompts.append(self._render(dialogue, generate=True))
            before, _, after = prompts[-1].partition(reply.content)
            # A generation prompt may contain more than the prefix of a later reply (an empty
            # thought). That is harmless: the sequence keeps the fed tokens. Some templates put a
            # space before the reply, which the model then samples.
            if not prompts[-2].rstrip().startswith(before.rstrip()):
                raise AtodError(_REWRITES.format("an earlier prompt changes"))
            continuations.add(after.replace(user.content, ""))
        if len(continuations) > 1:
            raise AtodError(_REWRITES.format("a turn depends on its position"))
