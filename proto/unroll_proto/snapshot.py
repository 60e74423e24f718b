"""Snapshot: the state of one sequence between two timesteps, as a value to keep, send and resume from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from unroll_proto.files import replacing
from unroll_proto.v1 import unroll_pb2 as pb

FORMAT = 1

_FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of one sequence after `step` timesteps. Snapshots are equal when model, bundle, step and bits are.

    Attributes:
        model: Model name.
        version: Model version; the state is of no use to another one.
        architecture: Kind of network, such as "simple_rnn".
        step: Timesteps that the sequence has consumed.
        data: State tensors of the model, each as little-endian float32.
        num_layers: Stacked layers of the model; 0 if unknown, as in a snapshot read from bytes.
        bundle: Id of the version's content, 16 bytes; empty if unknown.
    """

    model: str
    version: int
    architecture: str
    step: int
    data: tuple[bytes, ...] = field(repr=False)
    num_layers: int = field(default=0, repr=False, compare=False)
    bundle: bytes = field(default=b"", repr=False)

    @property
    def state(self) -> tuple[NDArray[np.float32], ...]:
        """State tensors as float32 [num_layers, hidden_size], read-only.

        If `num_layers` is unknown, the layers are concatenated: [1, num_layers * hidden_size].
        """
        return tuple(np.frombuffer(data, _FLOAT32).reshape(self.num_layers or 1, -1) for data in self.data)

    def to_bytes(self) -> bytes:
        """Serializes the snapshot as `unroll.v1.Snapshot`; equal snapshots give equal bytes."""
        return self.to_proto().SerializeToString(deterministic=True)

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """Decodes the bytes of `to_bytes`.

        Raises:
            ValueError: the bytes are not a snapshot, or one of a newer format.
        """
        try:
            message = pb.Snapshot.FromString(data)
        except DecodeError:
            raise ValueError("no snapshot: the bytes are no unroll.v1.Snapshot") from None
        return cls.from_proto(message)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the snapshot to a file, completely or not at all, even after a power cut."""
        with replacing(Path(path)) as file:
            file.write(self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Reads a file of `save`.

        Raises:
            ValueError: the file does not hold a snapshot.
            OSError: it can't be read.
        """
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_proto(self) -> pb.Snapshot:
        """Encodes the snapshot as a message of the wire."""
        return pb.Snapshot(
            format=FORMAT,
            model=self.model,
            version=self.version,
            architecture=self.architecture,
            step=self.step,
            state=self.data,
            bundle=self.bundle,
        )

    @classmethod
    def from_proto(cls, message: pb.Snapshot, num_layers: int = 0) -> Snapshot:
        """Decodes a message of the wire.

        Raises:
            ValueError: its format is another, or its state is not float32 in equal layers.
        """
        if message.format != FORMAT:
            raise ValueError(f"no snapshot of format {FORMAT}: its format is {message.format}")
        if not message.state or any(len(data) % (_FLOAT32.itemsize * (num_layers or 1)) for data in message.state):
            raise ValueError("no snapshot: its state is no float32 [num_layers, hidden_size]")
        return cls(
            model=message.model,
            version=message.version,
            architecture=message.architecture,
            step=message.step,
            data=tuple(message.state),
            num_layers=num_layers,
            bundle=message.bundle,
        )
