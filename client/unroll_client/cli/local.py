"""The backend that computes in this process: a bundle, by the engine. The only file that imports unroll_engine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from unroll_client._types import Classification
from unroll_client.cli.backends import Backend, BlockSize, RefusedSequenceError
from unroll_engine import BundleError, Engine, InvalidRequestError, Ragged
from unroll_proto.cli import InputError
from unroll_proto.sequences import Block


class BundleBackend:
    """A bundle in this process, on every core that the process may use.

    Args:
        engine: Runs the model.
    """

    block_size = BlockSize(sequences=16_384, values=1 << 20)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.version = engine.spec.key
        self.input_size, self.class_labels = engine.spec.input_size, engine.spec.class_labels
        self.feature_names = engine.spec.feature_names

    async def classify(self, block: Block) -> Classification:
        """See Backend."""
        try:
            result = await self._engine.aclassify(Ragged(block.values, block.lengths))
        except InvalidRequestError as error:
            if error.sequence is None:
                raise InputError(str(error)) from None
            raise RefusedSequenceError(error.sequence, error.description) from None
        columns = (result.labels, result.label_indices, result.probabilities, result.logits)
        return Classification(*columns, None, self.name, self.version)


@asynccontextmanager
async def loaded(path: Path) -> AsyncIterator[Backend]:
    """Yields the backend of a bundle.

    Raises:
        InputError: there is no bundle at the path, or it can't be trusted, loaded or run.
    """
    try:
        engine = Engine.load(path)
    except BundleError as error:
        raise InputError(f"--bundle: {error}") from None
    with engine:
        yield BundleBackend(engine)
