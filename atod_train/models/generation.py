"""Sample the completions of many episodes at once.

A prompt is all that the model sees of an episode. Each episode draws from a random stream of its
own, so its samples do not depend on the others. `Sampler` is what a rollout needs. `Generator` is
the plain one; `models.vllm_sampler` samples with vLLM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atod_gym.errors import AtodError, InvalidSettingError
from atod_gym.parsing import CompletionFormat
from atod_train.models.budgets import episodes_at_once
from atod_train.models.checks import check_config
from atod_train.models.decoding import Feed, KVCache, padded_logits
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.fast.llama import can_be_packed, packed_logits
from atod_train.models.fast.prefix_trees import common_prefix
from atod_train.models.policy import Policy
from atod_train.records import FinishReason


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """A completion, exactly as it was sampled."""

    ids: tuple[int, ...]
    """Up to and including the end-of-turn token or the token that completed the action."""
    logprobs: tuple[float, ...]
    """One per id, of the distribution that was sampled from (temperature included); of temperature
    1 for greedy decoding."""
    finish_reason: FinishReason


class _Episode:
    """The tokens of one episode, and how many of them the cache holds."""

    __slots__ = ("cached", "ids", "row", "stream")

    def __init__(self, row: int, seed: int) -> None:
        self.row = row  # of the cache
        self.ids: list[int] = []  # the last prompt and its completion
        self.cached = 0  # first ones of `ids` whose keys and values are in the cache
        self.stream = torch.Generator().manual_seed(seed)

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


class Sampler(ABC):
    """Samples completions for a batch of episodes.

    Args:
        policy: The model to sample from.
        dialogue: Gives the stop tokens.
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
        self.max_context = max_context or policy.max_positions
        self._stop_rule = StopRule(dialogue, completion_format)
        self._generator = generator or torch.Generator().manual_seed(0)
        self.start(0)

    def draw_seeds(self, episodes: int) -> list[int]:
        """Return the seeds of the random streams of a number of episodes, for `start`.

        Where episodes are played in parts, or by several processes, all are drawn at once: each
        episode samples what it would if they were played together.
        """
        seeds: list[int] = torch.randint(2**62, (episodes,), generator=self._generator).tolist()
        return seeds

    def start(self, episodes: int | Sequence[int]) -> None:
        """Discard all episodes and begin new ones, the rows 0, 1, ..

        Args:
            episodes: Their seeds, or how many there are.
        """
        self._begin(self.draw_seeds(episodes) if isinstance(episodes, int) else episodes)

    def prompt(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[SampledTokens]:
        """Sample the next completions of some episodes.

        Args:
            prompts: All that the model sees of each, at least one token.
            rows: Distinct numbers of episodes.

        Returns:
            One completion per row, in the order of `rows`.

        Raises:
            AtodError: A prompt is empty, or does not fit `max_context` together with the longest
                completion.
        """
        longest = self.max_context - self.max_completion_tokens
        for ids in prompts:
            if not 0 < len(ids) <= longest:
                raise AtodError(
                    f"A prompt of {len(ids)} tokens; max_context={self.max_context} leaves room "
                    f"for 1 to {longest}."
                )
        return self._sample_turn(prompts, rows) if rows else []

    @abstractmethod
    def episodes_at_once(self, processes: int) -> int:
        """Return how many episodes have room; `processes` share the memory of a processor."""

    def end(self) -> None:
        """Discard all episodes, and give back what only they need."""
        self._begin([])

    @abstractmethod
    def _begin(self, seeds: Sequence[int]) -> None:
        """Begin episodes with random streams of these seeds."""

    @abstractmethod
    def _sample_turn(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> list[SampledTokens]:
        """Sample completions as `prompt`, whose arguments fit."""


class Generator(Sampler):
    """Samples with forward passes of the policy itself.

    Keys and values are kept from turn to turn, so only what follows the common prefix with the last
    prompt and its completion is fed. Episodes with the same tokens, as those of a group until they
    differ, are computed once.
    """

    def episodes_at_once(self, processes: int) -> int:
        """Return how many episodes have room for their keys and values."""
        return episodes_at_once(self.policy, self.max_context, processes)

    def _begin(self, seeds: Sequence[int]) -> None:
        self._next_logits = packed_logits if can_be_packed(self.policy) else padded_logits
        self._episodes = [_Episode(row, seed) for row, seed in enumerate(seeds)]
        self._cache = KVCache(len(seeds), self.policy.device)

    def _sample_turn(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> list[SampledTokens]:
        episodes = [self._episodes[row] for row in rows]
        for episode, ids in zip(episodes, prompts, strict=True):
            # At least one token is fed, to have logits after it.
            common = min(common_prefix(episode.ids, ids), len(ids) - 1)
            episode.ids, episode.cached = list(ids), min(episode.cached, common)
        # Autocast converts a weight once for all tokens, not for each, if it is trainable and
        # inference mode is off; frozen ones are stored in the lower precision.
        is_mixed = self.policy.autocast_dtype is not None
        with torch.no_grad() if is_mixed else torch.inference_mode(), self.policy.precision():
            return self._complete(episodes)

    def _complete(self, asked: list[_Episode]) -> list[SampledTokens]:
        """Sample one completion for each episode, whose last tokens are a prompt."""
        longest = max(len(episode.ids) for episode in asked)
        self._cache.reserve(longest + self.max_completion_tokens)
        self._compact(asked)
        episodes = sorted(asked, key=lambda episode: episode.row)
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
        found = {
            episode: SampledTokens(tuple(sampled[i]), tuple(scores[i]), reasons[i])
            for i, episode in enumerate(episodes)
        }
        return [found[episode] for episode in asked]

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
            logits = logits[[first.index(leader) for leader in leaders]]
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
        if logits.device.type == "mps":  # it has no float64
            logits = logits.cpu()
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
