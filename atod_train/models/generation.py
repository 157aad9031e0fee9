"""Sample the completions of many episodes at once.

The tokens that the cache lacks are fed, which gives the logits of the next token. A token is
sampled and appended, until the completion ends. The cache is kept from turn to turn: in chat style
what follows the last completion is fed, in window style the part of the new prompt behind its
common prefix with the last sequence. Episodes with the same tokens, as those of a group until they
differ, are computed once. Each episode draws from a random stream of its own, so its samples do not
depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atod_gym.errors import AtodError, InvalidSettingError
from atod_gym.parsing import CompletionFormat
from atod_train.models.checks import check_config
from atod_train.models.decoding import Feed, KVCache, padded_logits
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.fast.llama import can_be_packed, packed_logits
from atod_train.models.fast.prefix_trees import common_prefix
from atod_train.models.policy import Policy
from atod_train.records import FinishReason


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion, exactly as it was sampled."""

    ids: tuple[int, ...]
    """Up to and including the end-of-turn token or the token that completed the action."""
    logprobs: tuple[float, ...]
    """One per id, of the distribution that was sampled from (temperature included); of temperature
    1 for greedy decoding."""
    finish_reason: FinishReason


class _Episode:
    """The tokens of one episode, and how many of them the cache holds."""

    __slots__ = ("cached", "ids", "is_fresh", "row", "stream")

    def __init__(self, row: int, seed: int) -> None:
        self.row = row  # of the cache
        self.ids: list[int] = []  # prompts and completions
        self.cached = 0  # first ones of `ids` whose keys and values are in the cache
        self.is_fresh = True  # the next prompt is a whole one
        self.stream = torch.Generator().manual_seed(seed)

    def extend(self, prompt: Sequence[int]) -> None:
        """Add a prompt: what follows the last completion, or a whole one."""
        if not self.is_fresh:
            self.ids += prompt
            return
        # At least one token is fed, to have logits after it.
        self.cached = min(self.cached, common_prefix(self.ids, prompt), len(prompt) - 1)
        self.ids = list(prompt)
        self.is_fresh = False

    def feed(self) -> Feed:
        """Return the tokens that the cache lacks; afterwards it holds all."""
        feed = Feed(self.row, self.cached, self.ids[self.cached :])
        self.cached = len(self.ids)
        return feed


class StopRule:
    """Decides whether a completion ends before the limit of tokens.

    Args:
        dialogue: Gives the stop tokens and decodes.
        form: Completions also end with the token that completes the action; None: only at a stop
            token.
    """

    def __init__(self, dialogue: DialogueEncoder, form: CompletionFormat | None) -> None:
        self._dialogue = dialogue
        self._format = form if form is not None and form.stop_strings else None
        self._last_characters = {stop[-1] for stop in form.stop_strings} if form else set()
        self._can_complete: dict[int, bool] = {}

    def reason(self, ids: list[int]) -> FinishReason | None:
        """Return why a completion ends with the last of its tokens; None: it continues."""
        if ids[-1] in self._dialogue.stop_ids:
            return "stop"
        if self._format is None or not self._can_complete_action(ids[-1]):
            return None
        text = self._dialogue.decode(ids)
        end = self._format.end_of_action(text, in_thought=self._dialogue.opens_thought)
        return None if end is None else "action"

    def kept(self, ids: list[int]) -> int:
        """Return how many tokens remain of a completion that was sampled without this rule.

        Tokens after the action are cut off, unless they are only the end of the turn.
        """
        last = len(ids) - (bool(ids) and ids[-1] in self._dialogue.stop_ids)
        if self._format is not None:
            for count in range(1, last):
                if self.reason(ids[:count]) == "action":
                    return count
        return len(ids)

    def _can_complete_action(self, token: int) -> bool:
        """Return whether a token holds a character that can complete an action, such as `>`."""
        if token not in self._can_complete:
            characters = set(self._dialogue.decode([token]))
            self._can_complete[token] = not characters.isdisjoint(self._last_characters)
        return self._can_complete[token]


class Generator:
    """Sample completions for a batch of episodes.

    Args:
        policy: The model to sample from.
        dialogue: Gives the stop tokens and the style (chat: each turn continues the sequence;
            window: each turn is a sequence of its own).
        temperature: 1 samples from the model's own distribution; 0 is greedy.
        max_completion_tokens: Longest completion, end-of-turn token included.
        completion_format: Completions also end with the token that completes the action, where the
            parse profile marks its end. None: only at a stop token.
        max_context: Longest sequence of prompt and completion tokens; by default the model's.
        generator: CPU source of the episodes' random streams, advanced by `start` alone. Its state
            and the prompts determine everything that is sampled.

    Raises:
        InvalidSettingError: A setting out of range.
        AtodError: A model that cannot be sampled from, see `check_config`.
    """

    def __init__(
        self,
        policy: Policy,
        dialogue: DialogueEncoder,
        *,
        temperature: float = 1.0,
        max_completion_tokens: int = 16,
        completion_format: CompletionFormat | None = None,
        max_context: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_config(policy.model.config, policy.name, max_context or policy.max_positions)
        if temperature < 0 or max_completion_tokens < 1:
            raise InvalidSettingError("temperature must be >= 0 and max_completion_tokens >= 1.")
        self.policy = policy
        self.dialogue = dialogue
        self.temperature = temperature
        self.max_completion_tokens = max_completion_tokens
        self._stop_rule = StopRule(dialogue, completion_format)
        self.max_context = max_context or policy.max_positions
        self._generator = generator or torch.Generator().manual_seed(0)
        self._next_logits = packed_logits if can_be_packed(policy) else padded_logits
        self._episodes: list[_Episode] = []
        self._cache = KVCache(0, policy.device)

    def start(self, episodes: int, *, before: int = 0, after: int = 0) -> None:
        """Discard all episodes and begin new ones, the rows 0 .. episodes - 1.

        Args:
            episodes: Number of episodes.
            before: Where several processes share a rollout, the episodes of those before this one.
            after: The episodes of those after it. All draw the random streams of all episodes and
                take their own, so that they sample what one process would.
        """
        count = before + episodes + after
        seeds = torch.randint(2**62, (count,), generator=self._generator).tolist()
        own = seeds[before : before + episodes]
        self._episodes = [_Episode(row, seed) for row, seed in enumerate(own)]
        self._cache = KVCache(episodes, self.policy.device)

    def restart(self, row: int) -> None:
        """Make the next prompt of an episode a whole one; its random stream continues.

        Args:
            row: Number of the episode; its `context_length` is 0 from now on.
        """
        self._episodes[row].is_fresh = True

    def fits(self, row: int, new_ids: Sequence[int]) -> bool:
        """Return whether a prompt and the longest completion after it fit `max_context`.

        Args:
            row: Number of the episode; it is not changed.
            new_ids: As for `prompt`, which returns None where this is False.
        """
        held = 0 if self.dialogue.style == "window" else self.context_length(row)
        return held + len(new_ids) + self.max_completion_tokens <= self.max_context

    def context_length(self, row: int) -> int:
        """Return the number of tokens of an episode so far, prompts and completions."""
        episode = self._episodes[row]
        return 0 if episode.is_fresh else len(episode.ids)

    def prompt(
        self, new_ids: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> list[Completion | None]:
        """Feed some episodes their prompts and sample their next completions.

        Args:
            new_ids: The prompts, each of at least one token. Chat style: first a whole prompt,
                later the continuation; window style: a whole prompt each time.
            rows: Distinct numbers of episodes.

        Returns:
            One completion per row, in the order of `rows`; None for an episode whose prompt and
            longest completion would not fit `max_context` (it is not changed).

        Raises:
            AtodError: A prompt is empty.
        """
        if not all(new_ids):
            raise AtodError("A prompt holds no token. Give at least one.")
        if self.policy.autocast_dtype is None:
            with torch.inference_mode():
                return self._prompt(new_ids, rows)
        # Autocast converts a weight once for all tokens, not for each, if it is trainable and
        # inference mode is off.
        frozen = [w for w in self.policy.model.parameters() if not w.requires_grad]
        try:
            for weight in frozen:
                weight.requires_grad_(True)
            with torch.no_grad(), self.policy.precision():
                return self._prompt(new_ids, rows)
        finally:
            for weight in frozen:
                weight.requires_grad_(False)

    def _prompt(
        self, new_ids: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> list[Completion | None]:
        fitting = []
        for row, ids in zip(rows, new_ids, strict=True):
            if self.fits(row, ids):
                if self.dialogue.style == "window":
                    self.restart(row)
                self._episodes[row].extend(ids)
                fitting.append(self._episodes[row])
        completions = self._complete(fitting) if fitting else {}
        return [completions.get(self._episodes[row]) for row in rows]

    def _complete(self, episodes: list[_Episode]) -> dict[_Episode, Completion]:
        """Sample one completion for each episode, whose last tokens are a prompt."""
        longest = max(len(episode.ids) for episode in episodes)
        self._cache.reserve(longest + self.max_completion_tokens)
        self._compact(episodes)
        episodes = sorted(episodes, key=lambda episode: episode.row)
        logits = self._prefill(episodes)
        uniforms = self._uniforms(episodes)
        sampled: list[list[int]] = [[] for _ in episodes]
        scores: list[list[float]] = [[] for _ in episodes]
        reasons: list[FinishReason] = ["length"] * len(episodes)
        active = list(range(len(episodes)))
        for step in range(self.max_completion_tokens):
            if step:
                feeds = [episodes[i].feed() for i in active]
                logits = self._next_logits(self.policy, self._cache, feeds)
            drawn = self._sample(logits, uniforms[active, step])
            # The host waits for the device here alone, once for each token.
            tokens, logprobs = torch.stack([part.double() for part in drawn]).tolist()
            still = []
            for i, token, logprob in zip(active, tokens, logprobs, strict=True):
                sampled[i].append(int(token))
                scores[i].append(logprob)
                episodes[i].ids.append(int(token))
                if reason := self._stop_rule.reason(sampled[i]):
                    reasons[i] = reason
                else:
                    still.append(i)
            active = still
            if not active:
                break
        return {
            episode: Completion(tuple(sampled[i]), tuple(scores[i]), reasons[i])
            for i, episode in enumerate(episodes)
        }

    def _compact(self, episodes: list[_Episode]) -> None:
        """Give the episodes the first rows of the cache, so that attention reads them in place.

        Others that had these rows are no longer cached: their tokens would be fed again.
        """
        count = len(episodes)
        taken = {episode.row for episode in episodes}
        evicted = [e for e in self._episodes if e.row < count and e.row not in taken]
        movers = [episode for episode in episodes if episode.row >= count]
        sources, targets = [e.row for e in movers], [e.row for e in evicted]
        self._cache.copy(sources, targets, max((e.cached for e in movers), default=0))
        for mover, other in zip(movers, evicted, strict=True):
            mover.row, other.row, other.cached = other.row, mover.row, 0

    def _prefill(self, episodes: list[_Episode]) -> Tensor:
        """Feed the prompts; return the logits [k, vocabulary] after them."""
        leaders = self._leaders(episodes)
        first = list(dict.fromkeys(leaders))
        logits = self._next_logits(self.policy, self._cache, [leader.feed() for leader in first])
        if len(first) < len(episodes):
            pairs = [(a, b) for a, b in zip(leaders, episodes, strict=True) if a is not b]
            longest = max(leader.cached for leader in first)
            self._cache.copy([a.row for a, _ in pairs], [b.row for _, b in pairs], longest)
            for leader, episode in pairs:
                episode.cached = leader.cached
            number = {leader: i for i, leader in enumerate(first)}
            logits = logits[[number[leader] for leader in leaders]]
        return logits

    def _leaders(self, episodes: list[_Episode]) -> list[_Episode]:
        """Return for each episode the first one with the same tokens, often itself."""
        first: dict[tuple[int, ...], _Episode] = {}
        return [first.setdefault(tuple(episode.ids), episode) for episode in episodes]

    def _uniforms(self, episodes: list[_Episode]) -> Tensor:
        """Return [k, max_completion_tokens] float64 in [0, 1), a row of each episode's stream."""
        size = self.max_completion_tokens
        rows = [torch.rand(size, generator=e.stream, dtype=torch.float64) for e in episodes]
        return torch.stack(rows)

    def _sample(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Sample from n distributions; return ids [n] int64 and their log-probs [n] float32."""
        if self.temperature == 0:
            logprobs = logits.log_softmax(dim=-1)
            ids = logits.argmax(dim=-1)
        else:
            scaled = logits if self.temperature == 1 else logits / self.temperature
            logprobs = scaled.log_softmax(dim=-1)
            # Inverse of the cumulative distribution; in double precision, so that a large
            # vocabulary leaves no gap at the end and an impossible token is never chosen.
            cumulative = logprobs.double().exp_().cumsum_(dim=-1)
            thresholds = uniforms[:, None].to(logits.device) * cumulative[:, -1:]
            ids = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1)
            ids = ids.clamp(max=logits.shape[-1] - 1)
        return ids, logprobs.gather(-1, ids[:, None]).squeeze(1)
