"""The engine in process and a server give the same bits, and resume each other's snapshots."""

from pathlib import Path

from support.processes import ServerProcess

from unroll_client import Client
from unroll_engine import Engine
from unroll_proto.sequences import Sequence


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
