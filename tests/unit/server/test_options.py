"""The settings of `unroll-serve`: each source, their precedence, and errors that name the source."""

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from unroll_proto import cli
from unroll_server.command import command
from unroll_server.config import Settings, Tuning
from unroll_server.errors import StartupError
from unroll_server.sources import Sources

SECONDS = ("drain_timeout", "models_poll", "session_ttl", "tuning.max_connection_age", "tuning.keepalive")
COUNTS = ("workers", "max_concurrent_calls", *(f"tuning.max_{name}" for name in ("lanes", "steps", "connections")))
FAULTS = [
    *((name, value) for name in SECONDS for value in ("nan", "inf", "1e10", "-1", "soon")),
    *((name, value) for name in COUNTS for value in ("2147483647", "0", "-1", "1.5", "many")),
    ("max_message_bytes", "1023"),
    ("max_message_bytes", "2147483648"),
    ("session_ttl", "0"),
    ("tuning.max_queued_steps", "9223372036854775808"),
    ("tuning.max_queued_bytes", "0"),
    ("runtime", "tensorflow"),
    ("log_level", "INFO"),
    ("access_log", "perhaps"),
    ("listen", "nonsense"),
    ("listen", ""),
    ("versions", "newest"),
    ("tls_key", "key.pem"),
    ("sessions", "memcached://:secret@host"),
]


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNROLL_CONFIG", raising=False)


def variable_of(name: str) -> str:
    return "UNROLL_" + name.upper().replace(".", "_")


def toml(name: str, value: str) -> str:
    """A file with one setting; numbers are written as numbers."""
    table, _, key = name.rpartition(".")
    bare = value in ("nan", "inf", "-1", "0", "1.5", "1e10", "true", "false") or value.isdigit()
    return (f"[{table}]\n" if table else "") + f"{key} = {value if bare else repr(value)}\n"


def settings_of(flags: dict[str, str], file: Path | None = None) -> Settings:
    sources = Sources.read({"models": "/m", **flags} | ({"config": str(file)} if file else {}))
    with sources.named_in_errors():
        return sources.settings()


def problem_of(flags: dict[str, str], file: Path | None = None) -> str:
    with pytest.raises(StartupError) as caught:
        settings_of(flags, file)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    return str(caught.value)


def test_flags_precede_the_environment_and_that_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "unroll.toml"
    file.write_text("workers = 2\nlog_level = 'debug'\nsession_ttl = 7\n[tuning]\nmax_lanes = 3\ntick_steps = 4\n")
    monkeypatch.setenv("UNROLL_LOG_LEVEL", "error")
    monkeypatch.setenv("UNROLL_WORKERS", "8")
    monkeypatch.setenv("UNROLL_TUNING_TICK_STEPS", "5")
    monkeypatch.setenv("UNROLL_METRICS", "")
    settings = settings_of({"workers": "9"}, file)
    assert (settings.workers, settings.log_level, settings.session_ttl) == (9, "error", 7.0)
    assert settings.tuning == Tuning(max_lanes=3, tick_steps=5)
    assert settings.metrics is None
    monkeypatch.setenv("UNROLL_CONFIG", str(file))
    monkeypatch.delenv("UNROLL_WORKERS")
    assert settings_of({}).workers == 2


@pytest.mark.parametrize(("name", "value"), FAULTS)
def test_a_wrong_value_gets_the_same_line_from_each_source(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "unroll.toml"
    file.write_text(toml(name, value))
    subject, _, of_file = problem_of({}, file).partition(": ")
    assert subject == f"{name} in {file}"
    problems = [of_file]
    if value:
        monkeypatch.setenv(variable_of(name), value)
        problems.append(problem_of({}).removeprefix(f"{variable_of(name)}: "))
        monkeypatch.delenv(variable_of(name))
    if "." not in name:
        flag = "--" + name.replace("_", "-")
        problems.append(problem_of({name: value}).removeprefix(f"{flag}: "))
    # TOML has numbers, and an error repeats a value as written.
    assert len({re.sub(r", not \S+$", "", problem) for problem in problems}) == 1


def test_the_flag_of_a_wrong_value_is_named() -> None:
    for arguments, line in (
        (["--models", "/m", "--workers", "0"], "--workers: must be an integer from 1 to 2147483646, not"),
        (["--tick-step", "3"], "--tick-step: unknown; did you mean tuning.tick_steps in --config or UNROLL_TUNING_"),
        (["--model", "x"], "--model: unknown; did you mean --models?"),
        ([], "--models: required; or set UNROLL_MODELS, or models in --config"),
    ):
        with pytest.raises(cli.InputError) as caught:
            command.main(arguments, standalone_mode=False)
        assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("max_lanes = 3", "max_lanes in FILE: unknown; did you mean tuning.max_lanes?"),
        ("[tuning]\nmax_lane = 3", "tuning.max_lane in FILE: unknown; did you mean tuning.max_lanes?"),
        ("[tuning]\nworkers = 3", "tuning.workers in FILE: unknown; did you mean workers?"),
        ("[tunning]\nmax_lanes = 3", "tunning in FILE: unknown; did you mean tuning?"),
        ("qqq = 3", "qqq in FILE: unknown; unroll-serve --help lists the settings"),
        ("config = 'x'", "config in FILE: a file can't name another; use --config or UNROLL_CONFIG"),
        ("tuning = 3", "tuning in FILE: must be a table, not 3"),
        ("listen = 50051", "listen in FILE: must be text, not empty and without NUL"),
        ("tls_cert = '\\u0000'", "tls_cert"),
        ("tls_cert = ['x']", "tls_cert in FILE: must be text, not empty and without NUL"),
        ("workers = true", "workers in FILE: must be an integer from 1 to 2147483646, not true"),
        ("workers", "--config: can't read FILE: Expected '='"),
        ("models = '\udcff'", "--config: can't read FILE: 'utf-8' codec"),
        ("listen = 'unix:/x'\nworkers = 2", "listen in FILE: only one process can listen on a Unix socket; needs"),
    ],
)
def test_a_fault_of_the_file_names_the_key(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "unroll.toml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert problem_of({}, file).startswith(problem.replace("FILE", str(file)))


def test_a_file_that_is_absent_is_named_by_its_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert problem_of({}, tmp_path / "x") == f"--config: can't read {tmp_path / 'x'}: No such file or directory"
    monkeypatch.setenv("UNROLL_CONFIG", str(tmp_path))
    assert problem_of({}) == f"UNROLL_CONFIG: can't read {tmp_path}: Is a directory"


def test_text_in_place_of_the_tuning_table_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "unroll.toml"
    file.write_text("[tuning]\nmax_lanes = 3\n")
    monkeypatch.setenv("UNROLL_TUNING", "fast")
    assert problem_of({}, file) == 'UNROLL_TUNING: must be a table, not "fast"'


def test_an_error_is_one_line_whatever_the_file_holds(tmp_path: Path) -> None:
    file = tmp_path / "unroll.toml"
    file.write_text('"a\\nb" = 3\n')
    with pytest.raises(cli.InputError) as caught:
        command.main(["--models", "/m", "--config", str(file)], standalone_mode=False)
    assert str(caught.value) == f"a b in {file}: unknown; unroll-serve --help lists the settings"


@pytest.mark.parametrize("name", ["UNROLL_MAX_LANES", "UNROLL_TUNING_MAX_LANE"])
def test_a_variable_of_another_name_is_not_ignored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "3")
    assert problem_of({}) == f"{name}: unknown; did you mean UNROLL_TUNING_MAX_LANES?"


def test_help_has_every_setting_and_fits_the_terminal() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    flags = set(re.findall(r"^  --([a-z-]+)", text, re.MULTILINE)) - {"help"}
    assert {flag.replace("-", "_") for flag in flags} == Settings.model_fields.keys() - {"tuning"}
    assert set(re.findall(r"^  (\w+) (?:N|SECONDS) ", text, re.MULTILINE)) == Tuning.model_fields.keys()
    assert max(map(len, text.splitlines())) <= 80


def test_every_flag_has_a_description() -> None:
    options = [each for each in command.params if isinstance(each, click.Option)]
    assert all(option.help and option.help.endswith((".", "[required]")) for option in options)
