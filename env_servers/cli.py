"""`atod-serve`: starts a server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError("must be from 0 to 65535")
    return number


def _minutes(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1e6:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1,000,000")
    return number


# What argparse names when a value is refused: "invalid whole number value: 'x'".
_positive.__name__ = _port.__name__ = "whole number"
_minutes.__name__ = "number"


def parser() -> argparse.ArgumentParser:
    """The command line of `atod-serve`."""
    top = _Parser(prog="atod-serve", description="Starts the server of an environment.")
    commands = top.add_subparsers(required=True, metavar="SERVER", dest="server")
    _add_webshop(commands)
    return top


def _add_service_options(command: argparse.ArgumentParser, port: int) -> None:
    command.add_argument("--host", default="127.0.0.1", help="address to listen on")
    command.add_argument("--port", type=_port, default=port, help="0 picks a free one")
    command.add_argument(
        "--max-body", type=_positive, default=1_000_000, metavar="BYTES", help="of one request"
    )
    command.add_argument(
        "--token-env",
        metavar="NAME",
        help="environment variable with a token that every request must carry"
        " (Authorization: Bearer, or as a password in the browser)",
    )
    command.add_argument(
        "--parent", type=_positive, metavar="PID", help="exit when this process is gone"
    )


def _add_webshop(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = commands.add_parser(
        "webshop",
        help="the shop of WebShop: JSON API and web pages",
        description="Serves the shop: a JSON API for agents, and the same shop as web pages under"
        " /shop for people and browser agents.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "--data", default="generated", help="generated, or a folder with the official files"
    )
    command.add_argument(
        "--products", type=_positive, default=1000, help="size of the generated shop"
    )
    _add_service_options(command, port=3000)
    command.add_argument("--capacity", type=_positive, default=4096, help="most live sessions")
    command.add_argument(
        "--idle-minutes", type=_minutes, default=30.0, help="a session unused for so long is closed"
    )
    command.add_argument("--splits", default="original", help="original or verl-agent")
    command.add_argument("--goal-seed", type=int, default=233, help="of prices and goal order")
    command.add_argument("--text-style", default="text", help="text or text_rich")
    command.add_argument("--noun-tagger", default="auto", help="spacy, words or auto")
    command.add_argument(
        "--human-goals", action="store_true", help="human instructions instead of synthetic ones"
    )
    command.add_argument(
        "--show-attributes", action="store_true", help="item pages have an Attributes sub page"
    )
    command.set_defaults(run=_run_webshop)


def _run_webshop(arguments: argparse.Namespace) -> None:
    # Imported here, so that --help and wrong arguments answer at once.
    from env_servers import process
    from env_servers.webshop.app import create_app
    from env_servers.webshop.products import ShopDataError
    from env_servers.webshop.sessions import SessionStore
    from env_servers.webshop.settings import ShopSettings
    from env_servers.webshop.shop import Shop

    process.exit_on_signals()
    if arguments.parent is not None:
        process.watch_parent(arguments.parent)
    token = process.read_token(arguments.token_env)
    with process.open_socket(
        arguments.host, arguments.port, has_token=token is not None
    ) as listener:
        try:
            shop = Shop.open(
                ShopSettings(
                    data=arguments.data,
                    products=arguments.products,
                    goal_seed=arguments.goal_seed,
                    human_goals=arguments.human_goals,
                    show_attributes=arguments.show_attributes,
                    splits=arguments.splits,
                    text_style=arguments.text_style,
                    noun_tagger=arguments.noun_tagger,
                )
            )
        except (ShopDataError, ValueError, OSError) as error:
            raise process.StartError(str(error)) from error
        store = SessionStore(
            shop, capacity=arguments.capacity, idle_seconds=60 * arguments.idle_minutes
        )
        app = create_app(store, max_body=arguments.max_body, token=token)
        process.serve(app, listener, service="webshop")


def main(argv: Sequence[str] | None = None) -> int:
    """The command `atod-serve`.

    Returns:
        0 after a clean end, 2 with one line on standard error if the server cannot start.
    """
    arguments = parser().parse_args(argv)
    try:
        from env_servers.process import StartError

        try:
            arguments.run(arguments)
        except StartError as error:
            return _refuse(str(error))
    except ModuleNotFoundError as error:
        return _refuse(f"the module {error.name} is missing; pip install 'atod[servers]'")
    return 0


def _refuse(message: str) -> int:
    print(f"atod-serve: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
