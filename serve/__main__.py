"""`stepspan`, or `python -m serve`: the self-hosted server. `--help` loads no model library."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from serve.errors import ConfigurationError

if TYPE_CHECKING:
    from serve.settings import ServeSettings

DESCRIPTION = "Serve SDXL text-to-image over HTTP. The settings are in docs/settings.md."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 after a clean end, 1 if the model failed or
    the doctor found a problem, 2 on wrong usage or a wrong setting."""
    as_module = os.path.basename(sys.argv[0]) == "__main__.py"
    program = "python -m serve" if as_module else "stepspan"
    parser = argparse.ArgumentParser(prog=program, description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", metavar="run|ray|doctor")
    _add_address(parser, host="127.0.0.1", port=8080)
    # Without defaults of its own: they would overwrite options given before the command.
    _add_address(commands.add_parser("run", help="serve (the default)"))
    _add_ray(
        commands.add_parser("ray", help="serve with replicas, on a Ray cluster of this machine")
    )
    doctor = commands.add_parser("doctor", help="check the telemetry settings and send a trace")
    doctor.add_argument("--no-send", action="store_true", help="check the settings only")
    doctor.add_argument(
        "--backend",
        metavar="NAME",
        help="the backend that the endpoint forwards to, if its host is a proxy's or a collector's",
    )
    options = parser.parse_args(arguments)

    from serve.settings import load_settings

    try:
        settings = load_settings()
        if options.command == "doctor":
            return _doctor(settings, options)
        from serve.engine.call import current_call
        from serve.telemetry.logs import configure_logging

        configure_logging(settings.log_format, current_call.get)
        if options.command == "ray":
            return _ray(settings, options)
        from serve.server import run

        return run(settings, options.host, options.port)
    except ConfigurationError as error:
        print(f"stepspan: {error}", file=sys.stderr)
        return 2


def _doctor(settings: ServeSettings, options: argparse.Namespace) -> int:
    import logging
    import shutil

    from serve.telemetry.backends import BACKENDS
    from serve.telemetry.doctor import run
    from serve.telemetry.logs import configure_logging

    # For what it leaves out of libraries' messages; the doctor's own lines are no log.
    configure_logging(settings.log_format, lambda: None, logging.ERROR)

    backend = None
    if options.backend is not None:
        known = {_plain(backend.name): backend for backend in BACKENDS}
        backend = known.get(_plain(options.backend))
        if backend is None:
            names = ", ".join(backend.name for backend in BACKENDS)
            raise ConfigurationError(f"--backend {options.backend!r} is not known. Known: {names}.")
    width = min(100, shutil.get_terminal_size().columns)
    return run(settings, print, sends=not options.no_send, treat_as=backend, width=width)


def _ray(settings: ServeSettings, options: argparse.Namespace) -> int:
    import secrets

    # Read when Ray is imported. Without them its daemons listen on every interface, it reports its
    # use to its makers, and it shows similar lines of two replicas as one.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if not any(name.startswith("RAY_AUTH_") for name in os.environ):
        # Ray's own would be in a file that other users may be able to read.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        from serve.ray_app import RayOptions, run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "ray":
            raise
        raise ConfigurationError(
            "ray is not installed: `pip install 'stepspan[ray,model]'` installs it."
        ) from None
    given = {name: getattr(options, name) for name in RayOptions.model_fields if name in options}
    return run(settings, options.host, options.port, given)


def _add_ray(parser: argparse.ArgumentParser) -> None:
    _add_address(parser)
    # Without defaults: those of `serve.ray_app.RayOptions` hold.
    for name, kind, text in (
        ("--replicas", int, "how many replicas, or the fewest (default: 1)"),
        ("--max-replicas", int, "the most replicas, by load (default: as many as --replicas)"),
        ("--run-seconds", float, "how long a run takes, as measured (default: 1)"),
        (
            "--wait-seconds",
            float,
            "how long requests may wait on average (default: as long as a run takes)",
        ),
        (
            "--upscale-seconds",
            float,
            "how long there must be too many requests to add a replica (default: 10)",
        ),
        (
            "--downscale-seconds",
            float,
            "how long there must be too few to remove one (default: 300)",
        ),
        (
            "--metrics-targets",
            str,
            "folder for the addresses of the replicas' metrics, for Prometheus' file_sd_configs",
        ),
    ):
        parser.add_argument(name, type=kind, default=argparse.SUPPRESS, help=text)


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "")


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
    # `python -m` looks for packages in the working directory first.
    if sys.path[0] == os.getcwd() and os.path.dirname(__file__) != os.path.join(
        sys.path[0], "serve"
    ):
        del sys.path[0]
        from serve.working_directory import name_shadowing_files

        name_shadowing_files("the command `stepspan` never looks there")
    sys.exit(main())
