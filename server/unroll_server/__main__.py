"""Entry point of `unroll-serve`, which heeds signals before it imports what takes time."""

from typing import NoReturn

from unroll_server.stopping import end_on_signals


def main() -> NoReturn:
    """Runs `unroll-serve`."""
    end_on_signals()
    from unroll_proto import cli
    from unroll_server.command import command

    cli.run("unroll-serve", command, "unroll-server")


if __name__ == "__main__":
    main()
