r"""Play one customer's episode: its state and how actions change it.

Source: `SimServer`, `WebAgentTextEnv.step` and `parse_action` of the original. The last one matches
`(.+)\[(.+)\]` greedily. Here one pass finds the same, since the pattern takes quadratic time
on hostile text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from env_servers.webshop.goals import Goal
from env_servers.webshop.pages import (
    BACK,
    BUY,
    NEXT,
    PREVIOUS,
    RESULTS_PER_PAGE,
    SEARCH,
    SUB_PAGES,
    Page,
    PageWriter,
    Purchase,
    SubPage,
)
from env_servers.webshop.reward import RewardDetails, reward_details
from env_servers.webshop.searching import LONGEST_SEARCH, SearchError

if TYPE_CHECKING:
    from env_servers.webshop.shop import Shop

LONGEST_ACTION = 10_000
"""Maximum length of an action, which limits a session's state; longer ones have no effect."""
_SITE = "http://127.0.0.1:3000"


class Action(NamedTuple):
    """One action of the shop."""

    verb: Literal["search", "click"]
    argument: str
    """In lower case, not empty."""


def parse_action(text: str) -> Action | None:
    """Return the action in a text; None if it has none.

    Text after the last closing bracket of the first line is ignored. The last opening
    bracket with text after it begins the argument.
    """
    line = text.partition("\n")[0]
    end = line.rfind("]")
    start = line.rfind("[", 1, max(0, end - 1))
    if start < 0:
        return None
    argument = line[start + 1 : end].lower()
    if line[:start] == "search":
        return Action("search", argument)
    return Action("click", argument) if line[:start] == "click" else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The effect of one action."""

    page: Page
    executed: bool
    """Whether the action had an effect: strict validity."""
    over: bool
    """Whether something was bought, now or before."""
    score: float
    """0 to 1 if this action was a purchase, else 0."""
    details: RewardDetails | None
    """The reward's parts if this action was a purchase."""
    message: str
    """Why the action had no effect, or a hint, in one sentence; else empty."""


class Episode:
    """One customer with one goal. Not thread-safe; a few kilobytes.

    After a purchase nothing can be clicked, but a search still works, as in the original.
    """

    __slots__ = ("_chosen", "_goal", "_name", "_over", "_page", "_results",
                 "_row", "_rows", "_shop", "_visited", "_writer")  # fmt: skip

    def __init__(self, shop: Shop, goal: Goal, name: str) -> None:
        """Start on the search page.

        Args:
            shop: may be shared by any number of episodes and threads.
            goal: one of the shop's goals.
            name: the session's name; it is part of addresses in rich text, and determines the
                result of `search[<r>]`.
        """
        self._shop = shop
        self._goal = goal
        self._name = name
        self._writer = PageWriter(goal.instruction, shop.settings.text_style)
        self._over = False
        self._enter()

    @property
    def page(self) -> Page:
        """The current page."""
        return self._page

    @property
    def over(self) -> bool:
        """Whether something was bought."""
        return self._over

    def step(self, action: str) -> Outcome:
        """Play `search[keywords]` or `click[name]`; any text is accepted.

        An action that is invalid or not on the page changes nothing. `click[..]` around a listed
        name is that click, even if the name has brackets or line breaks.
        """
        if action[:6] == "click[" and action[-1:] == "]":
            for name in (action[6:-1], action[6:-1].lower()):
                if name in self._page.clickables:
                    return self._click(name)
        if len(action) > LONGEST_ACTION:
            why = f"an action may have {LONGEST_ACTION:,} characters, not {len(action):,}."
            return self._nothing(why)
        parsed = parse_action(action)
        if parsed is None:
            if action.startswith("search[") and "[" in action[len("search[") :]:
                return self._nothing("keywords of a search have no brackets.")
            return self._nothing("write search[keywords] or click[name of a button].")
        if parsed.verb == "search":
            return self._search(parsed.argument)
        return self._click(parsed.argument)

    def _search(self, keywords: str) -> Outcome:
        try:
            rows = self._shop.search_rows(keywords, self._name)
        except SearchError as error:
            return self._nothing(str(error))
        self._rows = rows
        hint = ""
        if len(keywords) > LONGEST_SEARCH:
            hint = f"Only the first {LONGEST_SEARCH:,} characters were searched for."
        return self._show_results(keywords, 1, hint)

    def _click(self, name: str) -> Outcome:
        page = self._page
        if name not in page.clickables or page.kind == "search":
            if name == SEARCH:
                return self._nothing("to search, write search[keywords].")
            return self._nothing("this page has no such button.")
        if name == BUY:
            return self._buy()
        if name == BACK:
            self._enter()
            return self._shown()
        if page.kind == "results":
            if name == NEXT:
                return self._show_results(page.keywords, page.page_number + 1)
            if name == PREVIOUS:
                return self._show_results(page.keywords, page.page_number - 1)
            return self._open_product(page.clickables.index(name) - len(page.clickables))
        if name == PREVIOUS:
            if page.kind == "sub_page":
                return self._show_item()
            return self._show_results(page.keywords, page.page_number)
        if name in SUB_PAGES:
            return self._show_item(SUB_PAGES[name])
        self._chosen[self._shop.view(self._row).option_names[name]] = name
        return self._show_item()

    def _enter(self) -> None:
        """Go to the search page; the state of earlier pages is discarded."""
        self._rows = ()
        self._row = -1
        self._chosen: dict[str, str] = {}
        self._visited: set[str] = set()
        self._page = self._results = self._writer.search()

    def _show_results(self, keywords: str, page_number: int, hint: str = "") -> Outcome:
        first = (page_number - 1) * RESULTS_PER_PAGE
        lines = [self._shop.line(row) for row in self._rows[first : first + RESULTS_PER_PAGE]]
        self._row = -1
        self._chosen = {}
        self._page = self._results = self._writer.results(
            keywords, page_number, len(self._rows), lines, self._visited
        )
        if lines or page_number == 1:
            return self._shown(hint)
        return self._shown("This page is empty: the results end before it.")

    def _open_product(self, place: int) -> Outcome:
        """Open a product of the results page; `place` counts from the page's end, from -1."""
        on_page = len(self._page.products)
        first = (self._page.page_number - 1) * RESULTS_PER_PAGE
        self._row = self._rows[first + on_page + place]
        self._visited.add(self._page.products[place].asin)
        return self._show_item()

    def _show_item(self, sub_page: SubPage | None = None) -> Outcome:
        view = self._shop.view(self._row)
        url = self._item_url() if self._shop.settings.text_style == "text_rich" else ""
        self._page = self._writer.item(view, self._chosen, self._results, url, sub_page)
        return self._shown()

    def _buy(self) -> Outcome:
        product, price = self._shop.catalogue[self._row], self._shop.price(self._row)
        chosen = self._chosen.values()
        details = reward_details(self._goal, product, price, chosen, self._shop.tagger)
        purchase = Purchase(product, tuple(self._chosen.items()), price, details)
        self._over = True
        self._page = self._writer.done(purchase)
        return Outcome(self._page, True, True, details.reward, details, "")

    def _shown(self, hint: str = "") -> Outcome:
        return Outcome(self._page, True, self._over, 0.0, None, hint)

    def _nothing(self, why: str) -> Outcome:
        return Outcome(self._page, False, self._over, 0.0, None, f"Nothing was done: {why}")

    def _item_url(self) -> str:
        asin = self._shop.catalogue[self._row].asin
        keywords = self._results.keywords.replace(" ", "+")
        place = f"{asin}/{keywords}/{self._results.page_number}"
        return f"{_SITE}/item_page/{self._name}/{place}/{json.dumps(self._chosen)}"
