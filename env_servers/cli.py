"""`atod-serve`: start a server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from env_servers.options import ServiceOptions, add_options, option, read_options

if TYPE_CHECKING:
    from starlette.types import ASGIApp


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """Options of the shop's sessions."""

    capacity: int = option(4096, "maximum number of live sessions", least=1)
    idle_minutes: float = option(
        30.0, "minutes of inactivity after which a session is closed", least=0.001, most=1e6
    )
    max_turns: int = option(15, "turn limit on the web pages; not enforced", least=1)


def parser() -> argparse.ArgumentParser:
    """Return the command line of `atod-serve`."""
    from env_servers.retrieval.settings import CollectionSettings, EncoderSettings, Limits
    from env_servers.webshop.settings import ShopSettings

    top = _Parser(prog="atod-serve", description="Start the server of an environment.")
    commands = top.add_subparsers(required=True, metavar="SERVER", dest="server")

    def add(name: str, run: Callable[..., None], summary: str, description: str) -> _Parser:
        layout = argparse.ArgumentDefaultsHelpFormatter
        command = commands.add_parser(
            name, help=summary, description=description, formatter_class=layout
        )
        command.set_defaults(run=run)
        return command

    webshop = add(
        "webshop", _run_webshop, "the shop of WebShop: JSON API and web pages",
        "Serve the shop: a JSON API for agents, and the same shop as web pages under /shop for"
        " people and browser agents.",
    )  # fmt: skip
    add_options(webshop, ShopSettings, SessionOptions, ServiceOptions, port=3000)
    retrieval = add(
        "retrieval", _run_retrieval,
        "passages for Search-QA: the common /retrieve of search agents",
        "Serve passages: POST /retrieve as search agents call it, over a corpus file or a"
        " generated world with questions.",
    )  # fmt: skip
    add_options(retrieval, CollectionSettings, EncoderSettings, Limits, ServiceOptions, port=8000)
    return top


# Servers are imported when they run, so that --help and wrong arguments answer quickly.


def _run_webshop(arguments: argparse.Namespace) -> None:
    from env_servers.webshop.app import create_app
    from env_servers.webshop.products import ShopDataError
    from env_servers.webshop.sessions import SessionStore
    from env_servers.webshop.settings import ShopSettings
    from env_servers.webshop.shop import Shop

    def app(**service: Any) -> ASGIApp:
        sessions = read_options(SessionOptions, arguments)
        store = SessionStore(
            Shop.open(read_options(ShopSettings, arguments)),
            capacity=sessions.capacity,
            idle_seconds=60 * sessions.idle_minutes,
        )
        return create_app(store, max_turns=sessions.max_turns, **service)

    _serve(arguments, app, ShopDataError)


def _run_retrieval(arguments: argparse.Namespace) -> None:
    from env_servers.retrieval.app import create_app
    from env_servers.retrieval.collection import Collection
    from env_servers.retrieval.corpus import CorpusError
    from env_servers.retrieval.settings import CollectionSettings, EncoderSettings, Limits

    def app(**service: Any) -> ASGIApp:
        limits = read_options(Limits, arguments)
        settings = read_options(CollectionSettings, arguments)
        collection = Collection.open(settings, read_options(EncoderSettings, arguments))
        return create_app(collection, limits, **service)

    _serve(arguments, app, CorpusError)


def _serve(
    arguments: argparse.Namespace, make: Callable[..., ASGIApp], data_error: type[Exception]
) -> None:
    """Open the port, make the application, and serve it."""
    from env_servers import process

    process.exit_on_signals()
    if arguments.parent is not None:
        process.watch_parent(arguments.parent)
    token = process.read_token(arguments.token_env)
    with process.open_socket(
        arguments.host, arguments.port, has_token=token is not None
    ) as listener:
        try:
            app = make(
                max_body=arguments.max_body, token=token, allowed_hosts=arguments.allowed_host
            )
        except (data_error, ValueError, OSError) as error:
            raise process.StartError(str(error)) from error
        process.serve(app, listener, service=arguments.server)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `atod-serve`.

    Returns:
        0 after a clean end, 2 with one line on standard error if the server cannot start.
    """
    arguments = parser().parse_args(argv)
    try:
        from env_servers.process import StartError

        try:
            arguments.run(arguments)
            return 0
        except StartError as error:
            message = " ".join(str(error).split())
    except ModuleNotFoundError as error:
        message = f"the module {error.name} is missing; pip install 'atod-gym[servers]'"
    print(f"atod-serve: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
