"""unroll-token: makes a bearer token, printed once, and the entry that admits it."""

import json
import secrets
from typing import NoReturn

import click

from unroll_proto import cli
from unroll_server.identity.tokens import IdentitiesError, digest_of, parse

TOKEN_BYTES = 32


@click.command(context_settings={"max_content_width": 100})
@click.argument("name")
@click.option("--admin", is_flag=True, help="Allow calls of the admin listener.")
def command(name: str, admin: bool) -> None:
    """Makes a random token for the identity NAME.

    The first line is the token, for the caller; it is not stored. The rest is the entry for the file of
    `unroll-serve --tokens`, with the token's hash.
    """
    token = secrets.token_urlsafe(TOKEN_BYTES)
    lines = [f"[identities.{json.dumps(name)}]", f'tokens = ["sha256:{digest_of(token).hex()}"]']
    entry = "\n".join([*lines, "admin = true"] if admin else lines)
    try:
        parse(entry)
    except IdentitiesError as error:
        raise cli.InputError(f"NAME: {str(error).rpartition(': the name ')[2]}") from None
    click.echo(f"{token}\n\n{entry}")


def main() -> NoReturn:
    """Entry point of `unroll-token`."""
    cli.run("unroll-token", command, "unroll-server")


if __name__ == "__main__":
    main()
