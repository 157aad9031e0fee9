"""Define the shop: catalogue, goals and search, shared by all episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache

from env_servers.new_folder import new_folder
from env_servers.webshop.catalogue import Catalogue, open_arrays, save_arrays, stored_line
from env_servers.webshop.files import DataFiles, content_sha256, folder_of
from env_servers.webshop.goals import Goal, Goals, GoalTable, draw_human, draw_synthetic
from env_servers.webshop.loading import Stock, stock_from_files, stock_in_memory, stored_in
from env_servers.webshop.nouns import NounTagger, open_tagger
from env_servers.webshop.pages import ItemView, ResultLine
from env_servers.webshop.products import Instruction, ShopDataError
from env_servers.webshop.searching import Searcher
from env_servers.webshop.settings import ShopSettings
from env_servers.webshop.splits import Manifest, content_hash, split_ranges

_CACHED_PRODUCTS = 2048
_OFFICIAL_SEED = 233
# Of the published items_human_ins.json: SHA-256 of the file (see atod_gym/datasets/catalogue.toml),
# and `_wishes_hash` of its 13 instructions for products of the small set.
_HUMAN = (
    "cf78667548a71786e1d9049c24b802e48e1084ad4bb021cae56ce1f6d96954a3",
    "2dfc95e40d31f3a10428c4d77175210e1f53d329b4453ec2f8a808b1feb5dcd3",
)


class Shop:
    """One shop, shared by all its episodes; thread-safe."""

    def __init__(
        self,
        settings: ShopSettings,
        stock: Stock,
        goals: Goals,
        tagger: NounTagger,
        human: tuple[str, str] | None = None,
    ) -> None:
        """Combine the parts; `open` makes them.

        `human` are hashes of the file of human instructions and of the used ones.
        """
        self.settings = settings
        self.folder = None if settings.data == "generated" else folder_of(settings.data)
        """Folder of the data; None for the generated shop."""
        self.content_hash = stock.content_hash
        """SHA-256 of everything that is played: products, attributes, instructions. With equal
        settings, equal hashes give equal shops."""
        is_official = stock.is_published
        if human is not None:
            joined = f"{self.content_hash} {human[1]}"
            self.content_hash = hashlib.sha256(joined.encode()).hexdigest()
            is_official = is_official and (human[0] == _HUMAN[0] or human[1] == _HUMAN[1])
        # A folder may have any name.
        path = "./official" if settings.data == "official" else settings.data
        self.label = "official" if is_official else path
        """`generated`; `official` if the content is the published one; else the path."""
        self.catalogue: Catalogue = stock.catalogue
        self.goals = goals
        """In the original's order."""
        self.tagger = tagger
        self.name = _name(settings, self.label, len(stock.catalogue), self.content_hash)
        """Prefix of task ids, such as `webshop/official-1000`."""
        self.search_rows = Searcher(stock.catalogue, stock.index).rows
        """See `Searcher.rows`."""
        self.price = goals.price
        """Row of the catalogue -> the drawn price of the product in dollars."""
        self.splits = split_ranges(settings.splits, len(goals), official=self.label == "official")
        """Name of a split -> the indexes of its goals in `goals`."""
        self.view = lru_cache(_CACHED_PRODUCTS)(self._make_view)
        """Row of the catalogue -> the page of the product."""
        self.line = lru_cache(_CACHED_PRODUCTS)(self._make_line)
        """Row of the catalogue -> the product on a page of results."""

    @classmethod
    def open(cls, settings: ShopSettings) -> Shop:
        """Open a shop: a small one takes about a second, a stored one less.

        Raises:
            ShopDataError: if data is missing or damaged; names the file and the remedy.
        """
        tagger = open_tagger(settings.noun_tagger)
        if settings.data == "generated":
            if settings.human_goals:
                raise ShopDataError("The generated shop has no human goals: use human_goals=False.")
            # Imported here: needed for this kind of shop only.
            from env_servers.webshop.generator import generate_shop

            made = generate_shop(products=settings.products)
            stock = stock_in_memory(made.items, made.instructions.get, "the generated shop")
        else:
            files = DataFiles.find(settings.data)
            stock = stock_from_files(files)
        if not settings.human_goals:
            return cls(settings, stock, _synthetic_goals(stock, settings.goal_seed), tagger)
        columns = stock.catalogue.columns
        table, wishes = draw_human(columns, files.read_human(), settings.goal_seed)
        goals = Goals(stock.catalogue, table, wishes)
        hashes = content_sha256(files.human or files.items), _wishes_hash(stock, table, wishes)
        return cls(settings, stock, goals, tagger, hashes)

    def task_ids(self, split: str) -> tuple[str, ...]:
        """Return the split's task ids, sorted as text.

        Raises:
            KeyError: if there is no such split.
        """
        return tuple(sorted(f"{self.name}/{index}" for index in self.splits[split]))

    def manifest(self, split: str) -> Manifest:
        """Return the split's manifest, computed from every goal of the split.

        Raises:
            KeyError: if there is no such split.
        """
        task_ids, types = self.task_ids(split), []

        def tasks() -> Iterator[tuple[str, Goal]]:
            for task_id in task_ids:
                goal = self.goal(task_id)
                types.append(goal.category)
                yield task_id, goal

        total = content_hash(tasks())
        return Manifest(self.name, split, task_ids, tuple(types), total)

    def goal(self, task_id: str) -> Goal:
        """Return the goal of a task.

        Raises:
            KeyError: if there is no such task in any split.
        """
        digits = task_id[-11:].rpartition("/")[2]
        index = int(digits) if digits.isascii() and digits.isdigit() else -1
        if f"{self.name}/{index}" != task_id or not 0 <= index < len(self.goals):
            raise KeyError(task_id)
        return self.goals[index]

    def _make_view(self, row: int) -> ItemView:
        return ItemView(self.catalogue[row], self.settings.show_attributes)

    def _make_line(self, row: int) -> ResultLine:
        return ResultLine(self.catalogue[row])


def _name(settings: ShopSettings, label: str, products: int, content_hash: str) -> str:
    """Return a name of everything that the tasks depend on, so that task ids are unique."""
    kind = label if label in ("generated", "official") else "custom"
    parts = ["webshop/" + kind]
    if kind != "generated" or products != ShopSettings().products:
        parts.append(str(products))
    if kind == "custom":
        parts.append(content_hash[:8])
    if settings.human_goals:
        parts.append("human")
    if settings.goal_seed != _OFFICIAL_SEED:
        parts.append(f"seed{settings.goal_seed}")
    return "-".join(parts)


def _wishes_hash(stock: Stock, table: GoalTable, wishes: tuple[Instruction, ...]) -> str:
    """Return SHA-256 over the used instructions, with their products."""
    digest = hashlib.sha256()
    for row, wish in zip(table.rows.tolist(), wishes, strict=True):
        asin = stock.catalogue[row].asin
        digest.update(stored_line([asin, wish.text, wish.attributes, wish.options]))
    return digest.hexdigest()


def _synthetic_goals(stock: Stock, seed: int) -> Goals:
    """Draw the goals, or open those drawn before with the same seed."""
    columns = stock.catalogue.columns
    if stock.folder is None:
        return Goals(stock.catalogue, draw_synthetic(columns, seed))
    folder = stock.folder / f"goals-{seed}"
    with stored_in(stock.folder):
        with new_folder(folder) as partial:
            if partial is not None:
                save_arrays(draw_synthetic(columns, seed), partial)
        return Goals(stock.catalogue, open_arrays(GoalTable, folder))
