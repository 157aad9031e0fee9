"""Batched sampling for many episodes at once, with a cache that outlives the turn.

In chat style each turn feeds only what is new: the tokens that follow the last completion. In
window style every turn starts afresh with its full prompt, of which only what follows the part in
common with the last one is computed. What several episodes are fed after the same context, as those
of a group are until they part, is computed once. Each episode draws from a random stream of its
own, so what it samples does not depend on which other episodes are active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atod_gym.errors import AtodError, InvalidSettingError
from atod_gym.parsing import CompletionFormat
from atod_train.models.checks import check_config
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.fast.kv_cache import SlotCache
from atod_train.models.fast.packed import Feed, can_be_packed, last_states
from atod_train.models.fast.padded import padded_logits, padded_prefill
from atod_train.models.fast.prefix_trees import common_prefix
from atod_train.models.policy import Policy
from atod_train.records import FinishReason

_PACKED_TOKENS = 2**14
"""New tokens that go through the model at once where they are packed."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model sampled in one turn of one episode."""

    ids: tuple[int, ...]
    """With the end-of-turn token if it came, or up to the token that completed the action."""
    logprobs: tuple[float, ...]
    """One per id, under the distribution that was sampled from (temperature included); for greedy
    decoding at temperature 1."""
    finish_reason: FinishReason


class _Episode:
    """Where one episode stands in the cache."""

    __slots__ = ("held", "is_fresh", "pending", "slot", "stream")

    def __init__(self, slot: int, seed: int) -> None:
        self.slot = slot
        self.held: list[int] = []  # tokens whose keys and values are in the cache
        self.is_fresh = True  # the next feed is a whole prompt
        self.pending: list[int] = []  # sampled last and not yet fed
        self.stream = torch.Generator().manual_seed(seed)

    @property
    def context_length(self) -> int:
        return 0 if self.is_fresh else len(self.held) + len(self.pending)

    def take(self, ids: Sequence[int]) -> list[int]:
        """What must be computed to feed new tokens; forgets what the cache holds beyond them."""
        feed = [*self.pending, *ids]
        if self.is_fresh:
            # At least one token is fed, to have logits after it.
            common = common_prefix(self.held, feed[:-1])
            del self.held[common:]
            feed = feed[common:]
            self.is_fresh = False
        self.pending = []
        return feed


class StopRule:
    """Where completions end before they reach the limit of tokens."""

    def __init__(self, dialogue: DialogueEncoder, form: CompletionFormat | None) -> None:
        self._dialogue = dialogue
        self._format = form if form is not None and form.stop_strings else None
        self._last_characters = {stop[-1] for stop in form.stop_strings} if form else set()
        self._can_complete: dict[int, bool] = {}

    def reason(self, ids: list[int]) -> FinishReason | None:
        """Names why a completion ends with the last of its tokens; None: it does not."""
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
        """Whether a token holds a character that can complete an action, such as `>`."""
        if token not in self._can_complete:
            characters = set(self._dialogue.decode([token]))
            self._can_complete[token] = not characters.isdisjoint(self._last_characters)
        return self._can_complete[token]


class Generator:
    """Samples completions for a batch of episodes.

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
        self._is_packed = can_be_packed(policy)
        self._episodes: list[_Episode] = []
        self._cache = self._new_cache(0)

    def start(self, episodes: int, *, before: int = 0, after: int = 0) -> None:
        """Forget everything and begin `episodes` new episodes, the rows 0 .. episodes - 1.

        Processes that share `before + episodes + after` episodes draw the random streams of all of
        them and take their own, so that they sample what one process would.
        """
        count = before + episodes + after
        seeds = torch.randint(2**62, (count,), generator=self._generator).tolist()
        own = seeds[before : before + episodes]
        self._episodes = [_Episode(slot, seed) for slot, seed in enumerate(own)]
        self._cache = self._new_cache(episodes)

    def restart(self, row: int) -> None:
        """Forget what an episode was fed: its next feed is a whole prompt; its stream goes on.

        Args:
            row: Number of the episode; its `context_length` is 0 from now on.
        """
        self._episodes[row].is_fresh, self._episodes[row].pending = True, []

    def fits(self, row: int, new_ids: Sequence[int]) -> bool:
        """Whether an episode's new tokens and its longest completion fit `max_context`.

        Args:
            row: Number of the episode; nothing about it changes.
            new_ids: What `prompt` would be given for it.

        Returns:
            False exactly where `prompt` would answer None.
        """
        held = 0 if self.dialogue.style == "window" else self.context_length(row)
        return held + len(new_ids) + self.max_completion_tokens <= self.max_context

    def context_length(self, row: int) -> int:
        """Tokens of prompts and completions that an episode holds so far."""
        return self._episodes[row].context_length

    def prompt(
        self, new_ids: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> list[Completion | None]:
        """Feed each given episode its new tokens and sample its next completion.

        Only the rows given are computed; episodes that ended are simply not named any more.

        Args:
            new_ids: For each row the tokens to feed, at least one. Chat style: the first prompt,
                later the continuation; window style: the full prompt each time.
            rows: Distinct episode numbers.

        Returns:
            One completion per row, in the order of `rows`; None for an episode whose prompt and
            longest completion would not fit `max_context` (it is left as it was).
        """
        if not all(new_ids):
            raise AtodError("A prompt holds no token.")
        # Within `precision` weights are converted once for all tokens; inference mode prevents it.
        is_lower = self.policy.autocast_dtype is not None
        with torch.no_grad() if is_lower else torch.inference_mode(), self.policy.precision():
            return self._prompt(new_ids, rows)

    def _prompt(
        self, new_ids: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> list[Completion | None]:
        fitting = [
            index
            for index, (row, ids) in enumerate(zip(rows, new_ids, strict=True))
            if self.fits(row, ids)
        ]
        completions: list[Completion | None] = [None] * len(rows)
        if self.dialogue.style == "window":
            for index in fitting:
                self.restart(rows[index])
        if fitting:
            feeds = {index: self._episodes[rows[index]].take(new_ids[index]) for index in fitting}
            leaders = self._arrange({rows[index]: feed for index, feed in feeds.items()})
            fitting.sort(key=lambda i: (rows[i] in leaders, self._episodes[rows[i]].slot))
            episodes = [self._episodes[rows[index]] for index in fitting]
            places = {rows[index]: place for place, index in enumerate(fitting)}
            copies = [places[leaders[rows[i]]] for i in fitting if rows[i] in leaders]
            done = self._complete(episodes, [feeds[index] for index in fitting], copies)
            for index, completion in zip(fitting, done, strict=True):
                completions[index] = completion
        return completions

    def _arrange(self, feeds: dict[int, list[int]]) -> dict[int, int]:
        """Finds episodes that hold, and are fed, what another one holds and is fed.

        Without packing the episodes get the first slots, these ones the last of them.

        Returns:
            For each of these rows the other one's.
        """
        alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        leaders: dict[int, int] = {}
        for row, feed in feeds.items():
            held = self._episodes[row].held
            others = alike.setdefault((len(held), tuple(feed)), [])
            leader = next((other for other in others if self._episodes[other].held == held), None)
            if leader is None:
                others.append(row)
            else:
                leaders[row] = leader
        if not self._is_packed:  # packed rows may have any slots
            self._gather([self._episodes[row] for row in feeds if row not in leaders])
            self._gather([self._episodes[row] for row in feeds])
        return leaders

    def _new_cache(self, slots: int) -> SlotCache:
        layers = self.policy.model.config.num_hidden_layers
        return SlotCache(layers, slots, self.policy.device, is_masked=not self._is_packed)

    def _gather(self, episodes: list[_Episode]) -> None:
        """Give `episodes` the first slots; whoever is in the way changes places with them."""
        count = len(episodes)
        wanted = {id(episode) for episode in episodes}
        outside = [episode for episode in episodes if episode.slot >= count]
        in_the_way = [e for e in self._episodes if e.slot < count and id(e) not in wanted]
        pairs = list(zip(outside, in_the_way, strict=True))
        sources = [e.slot for pair in pairs for e in pair]
        targets = [e.slot for first, second in pairs for e in (second, first)]
        longest = max((len(e.held) for pair in pairs for e in pair), default=0)
        self._cache.move(sources, targets, longest)
        for first, second in pairs:
            first.slot, second.slot = second.slot, first.slot

    def _complete(
        self, episodes: list[_Episode], feeds: list[list[int]], copies: list[int]
    ) -> list[Completion]:
        """Prefill and decode the episodes.

        Args:
            episodes: without packing they hold the slots 0 .. k - 1 in this order.
            feeds: the new tokens of each.
            copies: for each of the last episodes the place among `episodes` of one that holds and
                is fed the same.
        """
        device = self.policy.device
        ends = [len(e.held) + len(feed) for e, feed in zip(episodes, feeds, strict=True)]
        room = max(ends)
        if not self._is_packed:
            # Rows are padded to the widest feed, also those that hold the most already.
            room = max(map(len, feeds)) + max(len(e.held) for e in episodes)
        self._cache.reserve(room + self.max_completion_tokens)
        alone = len(episodes) - len(copies)
        logits = self._prefill(episodes[:alone], feeds[:alone])
        if copies:
            sources = [episodes[place].slot for place in copies]
            self._cache.move(sources, [episode.slot for episode in episodes[alone:]], max(ends))
            logits = torch.cat([logits, logits[copies]])
        for episode, feed in zip(episodes, feeds, strict=True):
            episode.held += feed
        uniforms = self._uniforms(episodes)
        sampled: list[list[int]] = [[] for _ in episodes]
        scores: list[list[float]] = [[] for _ in episodes]
        alive = list(range(len(episodes)))
        positions = torch.tensor(ends, device=device)
        for step in range(self.max_completion_tokens):
            ids, logprobs = self._sample(logits, uniforms[alive, step])
            for row, token, score in zip(alive, ids.tolist(), logprobs.tolist(), strict=True):
                sampled[row].append(token)
                scores[row].append(score)
            alive = [row for row in alive if self._stop_rule.reason(sampled[row]) is None]
            if not alive or step + 1 == self.max_completion_tokens:
                break
            if self._is_packed:
                logits = self._feed(
                    [Feed(episodes[row].slot, ends[row] + step, sampled[row][-1:]) for row in alive]
                )
                continue
            # Finished rows between the others are computed too, which costs less than moving the
            # cache; what they write lies beyond their context and is overwritten next turn.
            count = alive[-1] + 1
            visible = max(ends[row] for row in alive) + step + 1
            latest = torch.tensor([ids[-1:] for ids in sampled[:count]], device=device)
            logits = padded_logits(
                self.policy, self._cache, 0, latest, positions[:count, None] + step, visible
            )[alive]
        return [
            self._finish(episode, ids, values)
            for episode, ids, values in zip(episodes, sampled, scores, strict=True)
        ]

    def _finish(self, episode: _Episode, ids: list[int], logprobs: list[float]) -> Completion:
        # The last token was sampled but not fed: it goes first in the next turn.
        episode.held += ids[:-1]
        episode.pending = [ids[-1]]
        reason = self._stop_rule.reason(ids) or "length"
        return Completion(tuple(ids), tuple(logprobs), reason)

    def _prefill(self, episodes: list[_Episode], feeds: list[list[int]]) -> Tensor:
        """Feed the new tokens; logits [k, vocabulary] after the last of each row."""
        held = [len(episode.held) for episode in episodes]
        if not self._is_packed:
            return padded_prefill(self.policy, self._cache, held, feeds)
        return self._feed(
            [
                Feed(e.slot, start, feed)
                for e, start, feed in zip(episodes, held, feeds, strict=True)
            ]
        )

    def _feed(self, feeds: Sequence[Feed]) -> Tensor:
        """Feed new tokens without padding; logits [k, vocabulary] after each feed's last one."""
        logits = []
        first = tokens = 0
        for after, feed in enumerate(feeds, 1):
            tokens += len(feed.ids)
            if tokens >= _PACKED_TOKENS or after == len(feeds):
                states = last_states(self.policy.model, self._cache, feeds[first:after])
                logits.append(self.policy.logits(states))
                first, tokens = after, 0
        return torch.cat(logits)

    def _uniforms(self, episodes: list[_Episode]) -> Tensor:
        """[k, max_completion_tokens] float64 in [0, 1), each row from its episode's stream."""
        size = self.max_completion_tokens
        rows = [torch.rand(size, generator=e.stream, dtype=torch.float64) for e in episodes]
        return torch.stack(rows).to(self.policy.device)

    def _sample(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [n] int64 and their log-probs [n] float32."""
        if self.temperature == 0:
            logprobs = logits.log_softmax(dim=-1)
            ids = logits.argmax(dim=-1)
        else:
            scaled = logits if self.temperature == 1 else logits / self.temperature
            logprobs = scaled.log_softmax(dim=-1)
            # Inverse of the cumulative distribution; in double precision, so that a large
            # vocabulary leaves no gap at the end and an impossible token is never chosen.
            cumulative = logprobs.double().exp_().cumsum_(dim=-1)
            thresholds = uniforms[:, None] * cumulative[:, -1:]
            ids = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1)
            ids = ids.clamp(max=logits.shape[-1] - 1)
        return ids, logprobs.gather(-1, ids[:, None]).squeeze(1)
