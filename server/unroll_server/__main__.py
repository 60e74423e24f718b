"""Entry point of `unroll-serve`. Signal handlers are installed before the imports that take time."""

from typing import NoReturn

from unroll_server.stopping import end, end_on_signals


def main() -> NoReturn:
    """Runs `unroll-serve`."""
    end_on_signals()
    from unroll_proto import cli
    from unroll_server.command import command

    try:
        cli.run("unroll-serve", command, "unroll-server")
    except SystemExit as ended:
        end(int(ended.code or 0))


if __name__ == "__main__":
    main()
