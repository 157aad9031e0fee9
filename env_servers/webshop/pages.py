"""Make the pages of the shop, as text for agents and as parts for drawing them.

Source: the templates of the original, `web_agent_site/templates/*.html`, and
`convert_html_to_text` of its `web_agent_text_env.py`, which parses the HTML of these templates.
Here a page is a list of pieces; no HTML is made or parsed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, get_args

from env_servers.webshop.products import Product
from env_servers.webshop.reward import RewardDetails

SEPARATOR = " [SEP] "
"""Separator of the pieces of a text."""
_ASCII_SPACES = " \t\n\r\f\v"


class PieceKind(Enum):
    """The kinds of pieces on a page."""

    TEXT = 0
    BUTTON = 1
    OPTION = 2
    """A value of an option."""
    LINK = 3
    """A link to a product; its text is the asin."""


class Piece(NamedTuple):
    """One piece of text on a page."""

    kind: PieceKind
    text: str


def text_piece(text: str) -> Piece:
    """Return a piece that cannot be clicked."""
    return Piece(PieceKind.TEXT, text)


def button(text: str) -> Piece:
    """Return a button."""
    return Piece(PieceKind.BUTTON, text)


def plain_text(pieces: Iterable[Piece]) -> str:
    """Return the style `text`: all pieces in one line, without white space around them."""
    return SEPARATOR.join([piece.text.strip() for piece in _visible(pieces)])


def rich_text(pieces: Iterable[Piece], url: str, visited: Collection[str]) -> str:
    """Return the style `text_rich`: one line per piece, with marks around clickable ones.

    An option counts as clicked if its value occurs in quotes in the page's address, so that values
    with quotes or letters beyond ASCII never do, as in the original. `visited` are asins of
    products that were opened before.
    """
    lines, clicked = [], []
    for kind, text in _visible(pieces):
        if kind is PieceKind.BUTTON:
            text = f"[button] {text} [button_]"
        elif kind is PieceKind.LINK:
            mark = "clicked button" if text in visited else "button"
            text = f"\n[{mark}] {text} [{mark}_]"
        elif kind is PieceKind.OPTION:
            if f'"{text}"' in url:
                clicked.append(f"You have clicked {text}.\n")
                text = f"  [clicked button] {text} [clicked button_]"
            else:
                text = f"  [button] {text} [button_]"
        lines.append(f"{text}\n")
    # The latest comes first.
    return "".join([*reversed(clicked), *lines])


def _visible(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the pieces that an HTML parser finds: white space with a line break is not text."""
    for piece in pieces:
        if piece.text.strip(_ASCII_SPACES):
            yield piece
        elif piece.text and "\n" not in piece.text:
            yield piece._replace(text=" ")


PageKind = Literal["search", "results", "item", "sub_page", "done"]
SubPage = Literal["Description", "Features", "Reviews", "Attributes"]

RESULTS_PER_PAGE = 10
BACK, PREVIOUS, NEXT, BUY = "back to search", "< prev", "next >", "buy now"
"""Names of buttons, as `click[..]` takes them."""
SEARCH = "search"
"""Listed as clickable on the search page, although clicking it has no effect."""
SUB_PAGES: dict[str, SubPage] = {name.lower(): name for name in get_args(SubPage)}
"""Sub pages by the names of their buttons, in page order."""

_BACK, _PREVIOUS, _NEXT = button("Back to Search"), button("< Prev"), button("Next >")
_TEMPLATE_MARKS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&'"}
"""JSON escapes of the template language."""
_BEFORE_CODE = ("Thank you for shopping with us!", "Your code: ", "None",
                " (Paste it in your MTurk interface.)", "Purchased", "asin")  # fmt: skip
_AFTER_OPTIONS = (
    "attrs", "None", "category", "None", "query", "None", "product category", "None", "Target",
    "asin", "options", "attrs", "price upper", "instuction text", "category", "product category",
    "query", "Goal ", "None", "Reward", "Your score (min 0.0, max 1.0)",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Purchase:
    """A purchased product with its options and score."""

    product: Product
    options: tuple[tuple[str, str], ...]
    """Chosen (name, value) pairs, in the order of choosing."""
    price: float
    """The drawn price in dollars."""
    details: RewardDetails


@dataclass(frozen=True, slots=True)
class Page:
    """One page, as text for agents and as parts for drawing it."""

    kind: PageKind
    instruction: str
    text: str
    """Exactly the original's observation, in the shop's text style."""
    clickables: tuple[str, ...]
    """The names that `click[..]` accepts, in page order and lower case."""
    has_search_bar: bool = False
    keywords: str = ""
    """The last search, on results, item and sub pages."""
    page_number: int = 1
    """Of the results, from 1."""
    total_results: int = 0
    """On a results page."""
    products: tuple[Product, ...] = ()
    """On a results page: the products of this page, at most ten."""
    product: Product | None = None
    """On item and sub pages."""
    sub_page: SubPage | None = None
    chosen_options: tuple[tuple[str, str], ...] = ()
    """On item and sub pages: (name, value) pairs, in the order of choosing."""
    purchase: Purchase | None = None
    """On the done page."""


class ResultLine:
    """The pieces of one product on a results page, computed once."""

    __slots__ = ("pieces", "product", "text")

    def __init__(self, product: Product) -> None:
        link = Piece(PieceKind.LINK, product.asin)
        self.product = product
        self.pieces = (link, text_piece(product.title), text_piece(product.price_text))
        self.text = plain_text(self.pieces)


class ItemView:
    """The pieces of a product's page below the instruction, computed once."""

    __slots__ = ("clickables", "option_names", "pieces", "product", "text")

    def __init__(self, product: Product, show_attributes: bool) -> None:
        """Take a product, and whether its page has the Attributes button."""
        names = [name for name in SUB_PAGES if show_attributes or name != "attributes"]
        pieces = [_PREVIOUS]
        option_names: dict[str, str] = {}
        for name, values in product.options:
            pieces.append(text_piece(name))
            pieces += [Piece(PieceKind.OPTION, value) for value in values]
            # A value under two names is one clickable, of the last name.
            option_names.update((value, name) for value in values if value)
        facts = product.title, f"Price: {product.price_text}", f"Rating: {product.rating}"
        pieces += map(text_piece, facts)
        pieces += [*(button(SUB_PAGES[name]) for name in names), button("Buy Now")]
        self.product = product
        self.pieces = tuple(pieces)
        self.text = plain_text(pieces)
        self.clickables = tuple(dict.fromkeys((BACK, PREVIOUS, *names, BUY, *option_names)))
        self.option_names = option_names
        """Option value -> name."""


class PageWriter:
    """Writes the pages that one customer sees."""

    def __init__(self, instruction: str, text_style: str) -> None:
        """Prepare the head of every page: the goal's instruction, in `text` or `text_rich`."""
        self._instruction = instruction
        self._is_rich = text_style == "text_rich"
        self._head = (text_piece("Instruction:"), text_piece(instruction), _BACK)
        self._head_text = plain_text(self._head)

    def _text(self, pieces: Iterable[Piece]) -> str:
        return rich_text(pieces, "", ()) if self._is_rich else plain_text(pieces)

    def search(self) -> Page:
        """Return the page with the search bar."""
        pieces = [text_piece("WebShop"), text_piece("Instruction: "),
                  text_piece(self._instruction), button("Search")]  # fmt: skip
        text = self._text(pieces)
        return Page("search", self._instruction, text, (SEARCH,), has_search_bar=True)

    def results(
        self,
        keywords: str,
        page_number: int,
        total: int,
        lines: Sequence[ResultLine],
        visited: Collection[str],
    ) -> Page:
        """Return one page of search results; `lines` are those of this page."""
        count = f"Page {page_number} (Total results: {total})"
        turning = (_PREVIOUS, _NEXT) if page_number > 1 else (_NEXT,)
        if self._is_rich:
            listed = [piece for line in lines for piece in line.pieces]
            text = rich_text([*self._head, text_piece(count), *turning, *listed], "", visited)
        else:
            texts = [piece.text for piece in turning] + [line.text for line in lines]
            text = SEPARATOR.join([self._head_text, count, *texts])
        buttons = (BACK, PREVIOUS, NEXT) if page_number > 1 else (BACK, NEXT)
        return Page(
            "results",
            self._instruction,
            text,
            (*buttons, *[line.product.asin.lower() for line in lines]),
            keywords=keywords,
            page_number=page_number,
            total_results=total,
            products=tuple([line.product for line in lines]),
        )

    def item(
        self,
        view: ItemView,
        chosen: Mapping[str, str],
        results: Page,
        url: str,
        sub_page: SubPage | None = None,
    ) -> Page:
        """Return the page of a product, or one of its sub pages.

        `results` is the previous results page. The page's address is needed for rich text only.
        """
        if sub_page is not None:
            facts = map(text_piece, _facts(view.product, sub_page))
            text = self._text([*self._head, _PREVIOUS, *facts])
        elif self._is_rich:
            text = rich_text((*self._head, *view.pieces), url, ())
        else:
            text = self._head_text + SEPARATOR + view.text
        return Page(
            "item" if sub_page is None else "sub_page",
            self._instruction,
            text,
            view.clickables if sub_page is None else (BACK, PREVIOUS),
            keywords=results.keywords,
            page_number=results.page_number,
            product=view.product,
            sub_page=sub_page,
            chosen_options=tuple(chosen.items()),
        )

    def done(self, purchase: Purchase) -> Page:
        """Return the page after a purchase, without the goal, as in the original."""
        options = json.dumps(dict(purchase.options), sort_keys=True).translate(_TEMPLATE_MARKS)
        texts = (*_BEFORE_CODE, purchase.product.asin, "options", options, *_AFTER_OPTIONS,
                 str(purchase.details.reward), "Reward Details ", "None")  # fmt: skip
        text = self._text(map(text_piece, texts))
        return Page("done", self._instruction, text, (), purchase=purchase)


def _facts(product: Product, sub_page: SubPage) -> list[str]:
    if sub_page == "Description":
        return [product.description]
    if sub_page == "Features":
        return [f" {bullet}" for bullet in product.bullets]
    if sub_page == "Attributes":
        attributes = [f" {attribute}" for attribute in product.attributes]
        return [*attributes, product.category, product.query, product.product_category]
    return [
        text
        for review in product.reviews
        for text in (f'"{review.title}"', f"{review.stars:g}", review.body)
    ]
