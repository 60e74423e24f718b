"""The file of identities: parsing, refusals, reloads; and the command that makes entries."""

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


def test_an_entry_has_tokens_and_quotas_which_override_the_defaults(tmp_path: Path) -> None:
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


def test_without_a_file_there_are_no_tokens_and_no_quotas() -> None:
    identities = Identities(None)
    assert not identities.have_tokens
    assert identities.of_token(digest_of("")) is None
    assert identities.named("x") == Identity("x")
    identities.reload()
    assert identities.version == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[identities", "not TOML"),
        ("tokens = []", "tokens: unknown; expected [defaults] or [identities.NAME]"),
        ("identities = 3", "identities: must be a table"),
        ("[identities]\nalice = 3", "identities.alice: must be a table"),
        ("defaults = []", "defaults: must be a table"),
        ("[defaults]\ntokens = []", "defaults.tokens: unknown; expected one of max_concurrent_calls, "),
        ("[identities.'a b']", "identities.a b: the name must have 1 to 128"),
        ("[identities.'']", "identities.: the name must"),
        (f"[identities.{'a' * 129}]", "the name must"),
        ("[identities.alice]\nadmin = 1", "identities.alice.admin: must be true or false"),
        ("[identities.alice]\nmax_queue = 1", "identities.alice.max_queue: unknown"),
        (
            "[identities.alice]\nmax_queued_steps = -1",
            "identities.alice.max_queued_steps: must be a whole number, 0 or more",
        ),
        (
            "[identities.alice]\nmax_queued_steps = true",
            "identities.alice.max_queued_steps: must be a whole number, 0 or more",
        ),
        (
            "[identities.alice]\nmax_queued_steps = 1.5",
            "identities.alice.max_queued_steps: must be a whole number, 0 or more",
        ),
        (f"[identities.alice]\ntokens = '{HASH}'", "identities.alice.tokens: must be a list"),
        ("[identities.alice]\ntokens = [3]", "identities.alice.tokens: each must be 'sha256:' and"),
        (f"[identities.alice]\ntokens = ['{HASH[:-1]}']", "identities.alice.tokens: each must be 'sha256:' and"),
        (
            f"[identities.alice]\ntokens = ['sha256:{digest_of('').hex()}']",
            "identities.alice.tokens: one is the hash of an empty token",
        ),
        (
            f"[identities.a]\ntokens = ['{HASH}']\n[identities.b]\ntokens = ['{HASH.upper()}']",
            "identities.b.tokens: a has one of these tokens too",
        ),
        ("[identities.a]\n[identities.a]", "not TOML"),
    ],
)
def test_a_wrong_file_ends_the_start_and_the_error_names_the_entry(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(StartupError) as raised:
        Identities(path)
    assert str(raised.value).startswith(f"--tokens: {path}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_error_does_not_repeat_a_token_that_was_not_hashed(tmp_path: Path) -> None:
    with pytest.raises(StartupError) as raised:
        Identities(written(tmp_path, "[identities.alice]\ntokens = ['hunter2']"))
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"x" * (16 * 2**20 + 1)])
def test_a_file_that_cannot_be_read_ends_the_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "identities.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StartupError, match="--tokens"):
        Identities(path)


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with suppress(IdentitiesError):
        parse(text)


def test_a_changed_file_is_read_again_and_a_wrong_one_changes_nothing(
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
    assert "identities.alice.tokens: each must be 'sha256:' and" in errors[0]
    assert "no such file" in errors[1]
    assert "hunter2" not in caplog.text

    # `mv` and Kubernetes replace a file by one of any age.
    new = tmp_path / "new"
    new.write_text(f"[identities.bob]\ntokens = ['{HASH}']")
    os.utime(new, (1, 1))
    new.replace(path)
    identities.reload()
    assert identities.of_token(digest_of("one")) == Identity("bob")
    path.touch()
    identities.reload()
    assert identities.version == 1


def test_unroll_token_prints_a_token_and_the_entry_that_admits_it(tmp_path: Path) -> None:
    first, second = (run("unroll-token", "spiffe://house/alice", "--admin").stdout for _ in range(2))
    token, _, entry = first.partition("\n\n")
    assert re.fullmatch(r"[\w-]{43}", token)
    assert token not in second
    assert token not in entry
    identities = Identities(written(tmp_path, entry))
    assert identities.of_token(digest_of(token)) == Identity("spiffe://house/alice", admin=True)


def test_unroll_token_refuses_an_invalid_name() -> None:
    done = run("unroll-token", "two words", check=False)
    assert done.returncode == 2
    assert done.stderr == "unroll-token: NAME: must have 1 to 128 visible ASCII characters\n"
