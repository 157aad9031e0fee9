"""A scripted shopper for WebShop: it shops from the pages alone, as an agent would have to.

It searches with the words of the instruction, opens products in the order of what they promise
(place in the results, price), reads features and description where the title leaves something
open, and buys the first product that has all that is wanted, or the best one when turns run out.
It follows the pages whatever was really executed, so that it recovers from actions that somebody
else took in its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from atod_gym.envs.webshop_texts import (
    PER_PAGE,
    Offer,
    PageText,
    content_words,
    parse_instruction,
    parse_page,
)

SEARCH_PLACEHOLDER: Final = "search[<query>]"
"""Stands for any search in a list of actions."""

_SUB_PAGES: Final = ("features", "description", "reviews", "attributes")
_TO_READ: Final = _SUB_PAGES[:2]

_APART: Final = 0.5
"""What a wanted word counts that is there, but beside no other word of its phrase."""
_ENOUGH: Final = 0.8
"""Coverage from which on a product is taken for the right one."""
_UNOPENED: Final = (1.3, -2.6, 0.0)
_OPENED: Final = ((2.0, -1.6, 0.5), (-4.5, -1.1, 7.5), (-5.0, -0.8, 8.0))
"""Log odds that buying a product scores 1: constant, per log(rank + 1), per coverage. Unopened, and
opened with 0, 1 and 2 sub pages read; rough fits over generated and official goals."""
_FAR_BELOW: Final = -1.0
"""Log odds of a price far below the limit: people name one not far above what they have in mind."""
_USUAL_MARGIN: Final = 40.0
_WORTH_A_LOOK: Final = 0.07
"""Products that promise less are not opened while a better one could be bought."""
_PARTIAL: Final = 0.1
"""Weight of the partial score beside the chance of the full one."""


@dataclass
class _Candidate:
    """What is known about one product."""

    offer: Offer
    words: list[str]
    """Content words of the title and of all that was read."""
    read: set[str] = field(default_factory=set)
    """Sub pages that were seen."""
    axes: dict[str, str] | None = None
    """Option value -> option name; None until the product's page was seen."""
    coverage: float | None = None
    """Share of the wanted words among `words`; None if that must be counted anew."""

    @property
    def page(self) -> int:
        """Page of the results that lists it, from 1."""
        return self.offer.rank // PER_PAGE + 1

    @property
    def lowest(self) -> float:
        """Lowest price in dollars."""
        return min(self.offer.prices, default=0.0)


def _candidate(offer: Offer) -> _Candidate:
    return _Candidate(offer, content_words(offer.title))


class ScriptedShopper:
    """Plays one episode after another; call `reset` at the start of each.

    It reads pages in the style `text`.

    Args:
        max_turns: Turns of an episode; the shopper buys before they end.
    """

    def __init__(self, max_turns: int = 15) -> None:
        self._max_turns = max_turns
        self.reset("", "")

    def reset(self, instruction: str, text: str) -> None:
        """Starts an episode.

        Args:
            instruction: What to buy.
            text: The first page; it tells nothing that the instruction does not.
        """
        del text
        self._list = parse_instruction(instruction)
        self._candidates: dict[str, _Candidate] = {}
        self._current: _Candidate | None = None
        self._results_page = 1
        self._is_own_search = True
        self._sub_page = _SUB_PAGES[0]
        self._chosen: dict[str, str] = {}
        self._turns_left = self._max_turns + 1

    def act(
        self, text: str, admissible_actions: Sequence[str] = (), last_action: str | None = None
    ) -> str:
        """Chooses the next action.

        Args:
            text: What the environment says now.
            admissible_actions: What is possible now; empty if that is not known.
            last_action: What was executed since the last call, the shopper's choice or not; None
                in the first turn.

        Returns:
            An action; one of the admissible ones if there are any, or a search where those hold
            `SEARCH_PLACEHOLDER`.
        """
        self._turns_left -= 1
        page = parse_page(text)
        possible = frozenset(admissible_actions)
        self._follow(page, possible, last_action or "")
        for action in self._plan(page):
            is_search = action.startswith("search[") and SEARCH_PLACEHOLDER in possible
            if not possible or is_search or action in possible:
                return action
        # Nothing that makes sense is possible: any way on.
        ways = sorted(possible - {SEARCH_PLACEHOLDER, "click[buy now]"})
        return ways[0] if ways else self._search()

    def _search(self) -> str:
        return f"search[{self._list.query}]"

    # What the pages tell.

    def _follow(self, page: PageText, possible: frozenset[str], last_action: str) -> None:
        """Takes in a page, knowing what was done to get there."""
        if last_action.startswith("search["):
            self._is_own_search = last_action == self._search()
        clicked = last_action[len("click[") : -1] if last_action.startswith("click[") else ""
        if page.kind in ("search", "results"):
            self._chosen = {}
        if page.kind == "results" and self._is_own_search:
            self._results_page = page.number
            for offer in page.offers:
                self._candidates.setdefault(offer.asin, _candidate(offer))
        elif page.kind == "item":
            self._read_item(page, possible, clicked)
        elif page.kind == "sub_page" and self._current is not None:
            self._sub_page = clicked if clicked in _SUB_PAGES else self._sub_page
            if self._sub_page not in self._current.read:
                self._current.read.add(self._sub_page)
                self._current.words += content_words(" ".join(page.lines))
                self._current.coverage = None

    def _read_item(self, page: PageText, possible: frozenset[str], clicked: str) -> None:
        if clicked.upper() in self._candidates:
            self._current = self._candidates[clicked.upper()]
        if self._current is None or self._current.offer.title != page.title:
            # Somebody came here by a way that was not seen.
            known = [c for c in self._candidates.values() if c.offer.title == page.title]
            stray = _candidate(Offer("", page.title, page.prices, 0))
            self._current = known[0] if known else stray
        names = {name for name, _ in self._list.options}
        axes, name = {}, ""
        for line in page.lines:
            if f"click[{line}]" not in possible if possible else line in names:
                name = line
            else:
                axes[line] = name
        self._current.axes = axes
        if clicked in axes:
            self._chosen[axes[clicked]] = clicked

    # What the shopper makes of it.

    def _values(self, candidate: _Candidate) -> list[str]:
        """The values to choose for the wanted options, as far as the product has them."""
        found = []
        axes = candidate.axes or {}
        for name, wanted in self._list.options:
            # A value counts as the wanted one if all its words are wanted, as in the reward.
            spoken = {*content_words(name), *content_words(wanted)}
            words = {v: content_words(v) for v in axes if axes[v] == name}
            alike = [v for v in words if words[v] and spoken.issuperset(words[v])]
            if wanted in axes:
                found.append(wanted)
            elif alike:
                found.append(max(alike, key=len))
        return found

    def _coverage(self, candidate: _Candidate) -> float:
        """Share of the wanted words in the product's texts, beside a neighbour of their phrase."""
        if candidate.coverage is not None:
            return candidate.coverage
        words = candidate.words
        known = set(words)
        pairs = set(pairwise(words))
        credits = []
        for phrase in self._list.phrases:
            for index, word in enumerate(phrase):
                before, after = phrase[max(0, index - 1) : index], phrase[index + 1 : index + 2]
                beside = [*before, *after]
                joined = any((word, b) in pairs or (b, word) in pairs for b in beside)
                credits.append((1.0 if joined or not beside else _APART) if word in known else 0.0)
        candidate.coverage = math.fsum(credits) / len(credits) if credits else 1.0
        return candidate.coverage

    def _promise(self, candidate: _Candidate) -> float:
        """The chance of the full score, and a little for a part of it."""
        options, limit = len(self._list.options), self._list.price_limit
        coverage, has = self._coverage(candidate), len(self._values(candidate))
        read = sum(name in candidate.read for name in _TO_READ)
        constant, per_rank, per_coverage = (
            _UNOPENED if candidate.axes is None else _OPENED[read]
        )  # fmt: skip
        odds = constant + per_rank * math.log(candidate.offer.rank + 1) + per_coverage * coverage
        if math.isfinite(limit) and candidate.lowest < limit - _USUAL_MARGIN:
            odds += _FAR_BELOW
        chance = 1.0 / (1.0 + math.exp(-odds))
        if candidate.lowest > limit or (candidate.axes is not None and has < options):
            chance = 0.0
        elif self._is_right(candidate):
            chance = 1.0
        attributes = max(1, len(self._list.phrases))
        is_cheap = max(candidate.offer.prices, default=0.0) <= limit
        partial = (coverage * attributes + has + is_cheap) / (attributes + options + 1)
        return chance + _PARTIAL * partial

    def _is_right(self, candidate: _Candidate) -> bool:
        """Whether a product is taken for one that has all that is wanted."""
        return (
            candidate.axes is not None
            and len(self._values(candidate)) == len(self._list.options)
            and candidate.lowest <= self._list.price_limit
            and self._coverage(candidate) >= _ENOUGH
        )

    def _cost(self, candidate: _Candidate) -> int:
        """Turns from the present page of results until a product is bought."""
        way = abs(candidate.page - self._results_page) + 1
        return way + len(self._list.options) + 1

    # Parts of the plan: each yields the next action first, and alternatives after it.

    def _plan(self, page: PageText) -> Iterator[str]:
        if page.kind == "search":
            yield self._search()
        elif page.kind == "results" and self._is_own_search:
            yield from self._browse(page)
        elif page.kind == "item" and self._current is not None:
            yield from self._judge(self._current)
        if page.kind != "results":
            yield "click[< prev]"
        yield "click[back to search]"

    def _browse(self, page: PageText) -> Iterator[str]:
        """On a page of results: opens a product, or turns the page."""
        known = list(self._candidates.values())
        opened = [c for c in known if c.axes is not None]
        fresh = [c for c in known if c.axes is None and self._promise(c) > _WORTH_A_LOOK]
        best = max(opened, key=self._promise, default=None)
        target = max(fresh, key=self._promise, default=None)
        if best is not None and self._is_right(best):
            target = best
        elif self._turns_page(page, target):
            yield "click[next >]"
        elif best is not None and self._turns_left < self._cost(best) + 2:
            # No turns left to open another product and come back.
            target = max(best, target or best, key=self._promise)
        target = target or best or max(known, key=self._promise, default=None)
        if target is not None:
            if target.page != self._results_page:
                yield "click[next >]" if target.page > self._results_page else "click[< prev]"
            yield f"click[{target.offer.asin.lower()}]"

    def _turns_page(self, page: PageText, target: _Candidate | None) -> bool:
        """Whether the first product of a page not seen yet promises more than those seen."""
        seen = max((c.page for c in self._candidates.values()), default=0)
        if page.total <= PER_PAGE * seen or page.number != seen:
            return False
        unseen = _candidate(Offer("", "", (self._list.price_limit,), PER_PAGE * seen))
        return self._promise(unseen) > (self._promise(target) if target else _WORTH_A_LOOK)

    def _judge(self, candidate: _Candidate) -> Iterator[str]:
        """On a product's page: reads on, leaves, or chooses the options and buys."""
        to_choose = [v for v in self._values(candidate) if v not in self._chosen.values()]
        spare = self._turns_left - len(to_choose) - 1
        if not self._is_right(candidate) and spare >= 2:
            own, (fresh, known) = self._promise(candidate), self._other_promises(candidate)
            unread = [name for name in _TO_READ if name not in candidate.read]
            # Descriptions seldom settle what features leave open.
            if unread and fresh < (own if len(unread) == 2 else _WORTH_A_LOOK):
                yield f"click[{unread[0]}]"
            # Two turns to see another product and two to come back.
            may_return = self._turns_left >= len(self._list.options) + 5
            if max(fresh, known) > own or (may_return and fresh > _WORTH_A_LOOK):
                yield "click[< prev]"
        for value in to_choose:
            yield f"click[{value}]"
        yield "click[buy now]"

    def _other_promises(self, candidate: _Candidate) -> tuple[float, float]:
        """The most that a new and a known product promise that can still be bought."""
        reachable = [
            other
            for other in self._candidates.values()
            if other is not candidate and self._cost(other) < self._turns_left
        ]
        fresh = (self._promise(other) for other in reachable if other.axes is None)
        known = (self._promise(other) for other in reachable if other.axes is not None)
        return max(fresh, default=0.0), max(known, default=0.0)
