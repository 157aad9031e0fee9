"""The settings of a shop: its data, goals and text style, and the server that has them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from atod_gym.errors import InvalidSettingError
from atod_gym.serving.connection import ServedConnection, ServerSettings, connect
from atod_gym.tasks import DataSource, check_data, data_label, expanded, locate

CHOICES = {"split_rule": ("original", "verl-agent"), "text_style": ("text", "text_rich")}

SEARCH_PLACEHOLDER = "search[<query>]"
"""Placeholder for any search in a list of actions; not an action itself."""

PRODUCT_FILES = ("items_shuffle_1000.json", "items_shuffle.json")

# Sessions of a server that this package started end with it; no other user needs their capacity.
_OWN_LIMITS = ("--idle-minutes", str(24 * 60), "--capacity", str(10**6))


def _find(path: Path) -> Path | None:
    for folder in (path, path / "webshop", path / "data"):
        for name in PRODUCT_FILES:
            if any((folder / f"{name}{suffix}").is_file() for suffix in ("", ".gz", ".xz")):
                return folder.resolve()
    return None


SOURCE = DataSource(
    name="webshop",
    title="WebShop",
    find=_find,
    expected=f"a folder with {' or '.join(PRODUCT_FILES)} (plain, .gz or .xz) and the items_ins_v2 "
    "file next to it",
    how_to_get="run atod-data get webshop (or webshop-full), or put items_shuffle_1000.json and "
    "items_ins_v2_1000.json (or the full items_shuffle.json and items_ins_v2.json), which the "
    "setup script of https://github.com/princeton-nlp/WebShop downloads, into ~/.cache/webshop, or "
    "name their folder in the environment variable WEBSHOP_DATA",
    generated="a generated shop",
    variables=("WEBSHOP_DATA",),
)


@dataclass(frozen=True, slots=True)
class ShopSettings:
    """Arguments of `WebShopEnv` that decide which server it uses; checked on creation."""

    data: str | os.PathLike[str]
    server_url: str | None
    split_rule: str
    products: int
    goal_seed: int
    text_style: str
    human_goals: bool
    timeout: float
    token: str | None = field(repr=False)

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise InvalidSettingError(
                    f"Unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}."
                )
        check_data(self.data)
        for name in ("goal_seed", "products"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidSettingError(f"{name} must be an integer, not {value!r}.")
        if self.products < 1:
            raise InvalidSettingError(f"products must be at least 1, not {self.products}.")
        if not isinstance(self.human_goals, bool):
            raise InvalidSettingError(f"human_goals must be a bool, not {self.human_goals!r}.")

    def connect(self) -> tuple[ServedConnection, str]:
        """Return the connection to the server with these settings, and the name of its data.

        Raises:
            DataNotFoundError: The data is missing; the message names the remedy.
            MissingExtraError: A server must be started and its packages are not installed.
            ServerError: The server does not start or answer.
            InvalidSettingError: The server at `server_url` has other settings or data.
        """
        folder = None
        if self.server_url is None:
            folder = locate(self.data, SOURCE, lambda found: self._served(found) == "official")
        connection = connect(self._server(folder))
        self.check(connection)
        served = str(connection.health.get("data"))
        if self.server_url is not None:
            return connection, served
        return connection, data_label(self.data, folder, is_official=served == "official")

    def _served(self, folder: Path | None) -> str:
        return str(connect(self._server(folder)).health.get("data"))

    def _server(self, folder: Path | None) -> ServerSettings:
        arguments = (
            *("--data", "generated" if folder is None else str(folder)),
            *("--splits", self.split_rule, "--goal-seed", str(self.goal_seed)),
            *("--text-style", self.text_style, "--products", str(self.products)),
            *_OWN_LIMITS,
            *(["--human-goals"] if self.human_goals else []),
        )
        return ServerSettings(
            "webshop",
            arguments if self.server_url is None else (),
            () if folder is None else tuple(sorted(map(str, folder.glob("items_*")))),
            server_url=self.server_url,
            token=self.token,
            timeout=self.timeout,
            advice="Is the server running? To start one: atod-serve webshop --port <port>",
        )

    def check(self, connection: ServedConnection) -> None:
        """Check that a server has these settings; `data="auto"` accepts any data.

        Raises:
            InvalidSettingError: The message names the first difference.
        """
        health = connection.health
        names = ["split_rule", "goal_seed", "text_style", "human_goals"]
        if health.get("data") == "generated":
            names.append("products")
        differing = [name for name in names if health.get(name) != getattr(self, name)]
        if self.server_url is not None and not self._is_data_of(connection):
            differing.insert(0, "data")
        if differing:
            name = differing[0]
            raise InvalidSettingError(
                f"The server at {connection.url} has {name}={health.get(name)!r}, but "
                f"{name}={getattr(self, name)!r} was requested. Change the setting, or start the "
                "server with it."
            )

    def _is_data_of(self, connection: ServedConnection) -> bool:
        """Return whether a server has the requested data, by name or by folder."""
        if self.data in ("auto", connection.health.get("data")):
            return True
        if self.data in ("official", "generated"):
            return False
        # Where there is no home folder of the name, `~user` stays.
        folder = _find(expanded(self.data))
        return folder is not None and str(folder) == connection.health.get("folder")
