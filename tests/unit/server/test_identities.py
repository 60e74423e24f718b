"""The file of identities: read, refused, read again; and the command that makes its entries."""

import hashlib
import logging
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.processes import run

from unroll_server.errors import StartupError
from unroll_server.identity.tokens import Identities, IdentitiesError, Identity, digest_of, parse

HASH = "sha256:" + hashlib.sha256(b"one").hexdigest()


def written(folder: Path, text: str) -> Path:
    path = folder / "identities.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_identity_has_tokens_and_limits_its_own_before_the_defaults(tmp_path: Path) -> None:
    text = f"""
    [defaults]
    max_concurrent_calls = 10
    max_open_sequences = 5

    [identities.alice]
    tokens = ["{HASH}", "SHA256:{"AB" * 32}"]
    max_concurrent_calls = 2
    max_queued_steps = 0
    max_open_sequences = 7
    max_sessions = 9

    [identities."spiffe://house/bob"]
    admin = true
    """
    identities = Identities(written(tmp_path, text))
    alice = Identity("alice", False, 2, 0, 7, 9)
    assert identities.of_token(digest_of("one")) == alice
    assert identities.of_token(bytes.fromhex("ab" * 32)) == alice
    assert identities.of_token(digest_of("two")) is None
    assert identities.of_token(b"") is None
    assert identities.named("alice") == alice
    assert identities.named("spiffe://house/bob") == Identity("spiffe://house/bob", True, 10, max_open_sequences=5)
    assert identities.named("stranger") == Identity("stranger", False, 10, max_open_sequences=5)
    assert identities.named("") == Identity("")
    assert identities.have_tokens


def test_without_a_file_nobody_has_a_token_or_a_limit() -> None:
    identities = Identities(None)
    assert not identities.have_tokens
    assert identities.of_token(digest_of("")) is None
    assert identities.named("x") == Identity("x")
    identities.reload()
    assert identities.version == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[identities", "no TOML"),
        ("tokens = []", "'tokens' is not known"),
        ("identities = 3", "identities: a table is expected"),
        ("[identities]\nalice = 3", "identities.alice: a table is expected"),
        ("defaults = []", "defaults: a table is expected"),
        ("[defaults]\ntokens = []", "defaults: 'tokens' is not known"),
        ("[identities.'a b']", "identities.a b: a name is"),
        ("[identities.'']", "identities.: a name is"),
        (f"[identities.{'a' * 129}]", "a name is"),
        ("[identities.alice]\nadmin = 1", "identities.alice: admin is true or false"),
        ("[identities.alice]\nmax_queue = 1", "identities.alice: 'max_queue' is not known"),
        ("[identities.alice]\nmax_queued_steps = -1", "identities.alice: max_queued_steps is a whole number"),
        ("[identities.alice]\nmax_queued_steps = true", "identities.alice: max_queued_steps is a whole number"),
        ("[identities.alice]\nmax_queued_steps = 1.5", "identities.alice: max_queued_steps is a whole number"),
        (f"[identities.alice]\ntokens = '{HASH}'", "identities.alice: tokens is a list"),
        ("[identities.alice]\ntokens = [3]", "identities.alice: a token is given as"),
        (f"[identities.alice]\ntokens = ['{HASH[:-1]}']", "identities.alice: a token is given as"),
        (f"[identities.alice]\ntokens = ['sha256:{digest_of('').hex()}']", "identities.alice: a token is empty"),
        (f"[identities.a]\ntokens = ['{HASH}']\n[identities.b]\ntokens = ['{HASH.upper()}']", "identities.b: a has"),
        ("[identities.a]\n[identities.a]", "no TOML"),
    ],
)
def test_a_file_that_is_wrong_ends_the_start_and_names_the_entry(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(StartupError) as raised:
        Identities(path)
    assert str(raised.value).startswith(f"--tokens: {path}: ")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_token_that_was_not_hashed_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(StartupError) as raised:
        Identities(written(tmp_path, "[identities.alice]\ntokens = ['hunter2']"))
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"x" * (16 * 2**20 + 1)])
def test_a_file_that_can_not_be_read_ends_the_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "identities.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StartupError, match="--tokens"):
        Identities(path)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(IdentitiesError):
        parse(text)


def test_a_changed_file_is_read_again_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = written(tmp_path, f"[identities.alice]\ntokens = ['{HASH}']")
    identities = Identities(path)
    path.write_text("[identities.alice]\ntokens = ['hunter2']")
    identities.reload()
    identities.reload()
    path.unlink()
    identities.reload()
    identities.reload()
    assert identities.version == 0
    assert identities.of_token(digest_of("one")) == Identity("alice")
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "identities.alice: a token is given as" in errors[0]
    assert "no such file" in errors[1]
    assert "hunter2" not in caplog.text

    # As `mv` and Kubernetes do it: another file in its place, of any age.
    new = tmp_path / "new"
    new.write_text(f"[identities.bob]\ntokens = ['{HASH}']")
    os.utime(new, (1, 1))
    new.replace(path)
    identities.reload()
    assert identities.of_token(digest_of("one")) == Identity("bob")
    path.touch()
    identities.reload()
    assert identities.version == 1


def test_unroll_token_shows_a_token_and_the_entry_that_lets_it_in(tmp_path: Path) -> None:
    first, second = (run("unroll-token", "spiffe://house/alice", "--admin").stdout for _ in range(2))
    token, _, entry = first.partition("\n\n")
    assert re.fullmatch(r"[\w-]{43}", token)
    assert token not in second
    assert token not in entry
    identities = Identities(written(tmp_path, entry))
    assert identities.of_token(digest_of(token)) == Identity("spiffe://house/alice", admin=True)


def test_unroll_token_refuses_a_name_that_can_not_be_one() -> None:
    done = run("unroll-token", "two words", check=False)
    assert done.returncode == 2
    assert done.stderr == "unroll-token: NAME: a name is 1 to 128 visible ASCII characters\n"
