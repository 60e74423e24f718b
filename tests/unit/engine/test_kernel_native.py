"""The kernel's C++: the same bits from every vector unit and compiler, accuracy, and no memory errors."""

import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "engine" / "unroll_engine" / "kernel" / "cpp"
PROGRAMS = Path(__file__).parent / "kernel"

COMMON = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"]
COMMON += ["-ffp-contract=off", f"-I{SOURCES}", "-pthread"]
X86: dict[str, tuple[str, ...]] = {"-march=x86-64-v3": (), "-march=x86-64-v4": ()}
"""Flags of the vector units, with further flags of each."""

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles a program of `kernel/` with the kernel, and returns its path; objects are compiled once."""
    folder = tmp_path_factory.mktemp("kernel")

    @cache
    def compiled(file: Path, *command: str) -> Path:
        output = folder / f"{len(list(folder.iterdir()))}-{file.stem}.o"
        output.touch()
        subprocess.run([*command, "-c", file, "-o", output], check=True)
        return output

    def built(program: str, compiler: str, *flags: str, units: dict[str, tuple[str, ...]] = X86) -> Path:
        if shutil.which(compiler) is None:
            pytest.skip(f"{compiler} is not installed")
        command = [compiler, *COMMON, *flags]
        objects = [
            compiled(PROGRAMS / f"{program}.cpp", *command),
            *(compiled(SOURCES / name, *command) for name in ("helper.cpp", "network.cpp", "queue.cpp")),
        ]
        objects += [compiled(SOURCES / "step.cpp", compiler, *COMMON, *own, unit) for unit, own in units.items()]
        output = folder / "-".join([program, compiler, *flags]).replace("/", "")
        subprocess.run([*command, *objects, "-o", output], check=True)
        return output

    return built


def digests(*command: str | Path) -> dict[str, str]:
    """Returns the digest of 200 networks by vector unit; the program must report no failure."""
    done = subprocess.run([*command, "200", "300"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(\S+) digest=(\w+) networks=200 .* most=(\d+) denormals=(\d+) failures=0$", done.stdout, re.M)
    assert lines, done.stdout
    assert all(int(most) > 250 and int(denormals) > 10_000 for _, _, most, denormals in lines)
    return {unit: digest for unit, digest, _, _ in lines}


@pytest.fixture(scope="module")
def expected(build: Build) -> str:
    """The digest of g++'s build, the same for every vector unit of this CPU."""
    found = digests(build("digest", "g++"))
    assert len(set(found.values())) == 1, found
    return next(iter(found.values()))


def test_clang_gives_the_bits_of_gcc(build: Build, expected: str) -> None:
    assert set(digests(build("digest", "clang++")).values()) == {expected}


def test_aarch64_gives_the_bits_of_x86(build: Build, expected: str) -> None:
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("qemu-user is not installed")
    program = build("digest", "aarch64-linux-gnu-g++", "-static", units={"-mcpu=generic": ()})
    assert digests(emulator, program) == {"aarch64": expected}


def test_sanitizers_find_nothing(build: Build, expected: str) -> None:
    # One vector unit: the other has the same templates, and would take most of a minute.
    flags = "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"
    program = build("digest", "g++", *flags, units={"-march=x86-64-v3": flags, "-march=x86-64-v4": ()})
    assert set(digests(program).values()) == {expected}


def test_threads_do_not_race(build: Build, expected: str) -> None:
    assert set(digests(build("digest", "g++", "-fsanitize=thread")).values()) == {expected}


def test_activations_are_within_two_ulp_and_monotonic_on_every_float(build: Build) -> None:
    done = subprocess.run([build("sweep", "g++")], capture_output=True, text=True, check=True)
    found = re.findall(
        r"^(\w+) units=\d+ floats=(\d+) worst=(\S+) at=\S+ decreases=(\d+) differences=(\d+)$", done.stdout, re.M
    )
    assert [name for name, *_ in found] == ["tanh", "sigmoid"], done.stdout
    for _, floats, worst, decreases, differences in found:
        assert int(floats) > 2 * 1_101_004_800, "every float from -20 to 20, and more"
        assert float(worst) <= 2
        assert (decreases, differences) == ("0", "0")
