"""`python -m serve`: the self-hosted server. `--help` answers without loading a model library."""

from __future__ import annotations

import argparse
import sys

from serve.errors import ConfigurationError

DESCRIPTION = "Serve SDXL text-to-image over HTTP. Settings are environment variables; see README."


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 after a clean end, 1 when the model failed, 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m serve", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", metavar="run")
    _add_address(parser, host="127.0.0.1", port=8080)
    # Without defaults of its own, which would overwrite what stands before the command.
    _add_address(commands.add_parser("run", help="serve (the default)"))
    options = parser.parse_args(arguments)

    from serve.settings import load_settings

    try:
        settings = load_settings()
        from serve.logs import configure_logging

        configure_logging(settings.log_format)
        from serve.server import run

        return run(settings, options.host, options.port)
    except ConfigurationError as error:
        print(f"stepspan: {error}", file=sys.stderr)
        return 2


def _add_address(parser: argparse.ArgumentParser, **defaults: str | int) -> None:
    parser.add_argument(
        "--host",
        default=defaults.get("host", argparse.SUPPRESS),
        help="address to listen on (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=defaults.get("port", argparse.SUPPRESS),
        help="port to listen on, 0 for a free one (default: 8080)",
    )


if __name__ == "__main__":
    sys.exit(main())
