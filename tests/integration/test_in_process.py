"""The engine in process and a server give the same bits, and resume each other's snapshots."""

from pathlib import Path

import numpy as np
from support.processes import ServerProcess, run

from unroll_client import Client
from unroll_engine import Engine
from unroll_proto.sequences import Sequence, write_sequences


def test_the_engine_in_process_and_the_server_are_the_same_to_the_bit(
    server: ServerProcess, bundle_root: Path, vowels: list[Sequence]
) -> None:
    sequences = [sequence.values for sequence in vowels]
    with Engine.load(bundle_root / "jv") as engine, Client(server.address) as client:
        mine = engine.classify(sequences, return_final_states=True)
        theirs = client.classify(sequences, model="jv", return_final_states=True)
        assert mine.labels == theirs.labels
        assert mine.logits.tobytes() == theirs.logits.tobytes()
        assert mine.probabilities.tobytes() == theirs.probabilities.tobytes()
        assert mine.final_states == theirs.final_states

        values = sequences[0]
        local = engine.open()
        with client.unroll("jv", logits=True) as remote:
            mine_steps, their_steps = local.advance(values[:4]), remote.send(values[:4])
            assert their_steps.states is not None
            assert their_steps.logits is not None
            assert mine_steps.states.tobytes() == their_steps.states.tobytes()
            assert mine_steps.logits.tobytes() == their_steps.logits.tobytes()
            handed_over = remote.snapshot()
        assert handed_over == local.snapshot()
        with client.unroll(snapshot=local.snapshot()) as remote:
            resumed = remote.send(values[4:])
        assert resumed.states is not None
        assert engine.open(handed_over).advance(values[4:]).states.tobytes() == resumed.states.tobytes()


def test_a_bundle_classifies_files_as_its_server_does(
    server: ServerProcess, bundle_root: Path, vowels: list[Sequence], tmp_path: Path
) -> None:
    write_sequences(tmp_path / "in.parquet", vowels)
    run("unroll", "classify", tmp_path / "in.parquet", "-o", tmp_path / "there.parquet", "--server", server.address)
    words = ("classify", tmp_path / "in.parquet", "-o", tmp_path / "here.parquet", "--bundle")
    done = run("unroll", *words, bundle_root / "jv")
    assert "370 sequences classified by jv version 1" in done.stdout
    assert (tmp_path / "here.parquet").read_bytes() == (tmp_path / "there.parquet").read_bytes()


def test_a_bundle_that_is_refused_is_one_line(bundle_root: Path, vowels: list[Sequence], tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_sequences(source, [*vowels[:2], Sequence("x", np.full((9, 12), 3e38, np.float32))])
    for words, says in (
        (("--bundle", tmp_path / "none"), "--bundle: "),
        (("--bundle", bundle_root / "jv", "--model", "jv"), "--bundle: not with --model, which is for servers"),
        (("--bundle", bundle_root / "jv", "--server", "a:1"), "--bundle: not with --server"),
    ):
        done = run("unroll", "classify", source, *words, check=False)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
        assert says in done.stderr
