"""A graph of whole sequences, as its file has it: what its dimensions are, and the proof of steps against it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from unroll_engine.models.spec import Float32Array
from unroll_engine.runtimes.step_session import step_session
from unroll_export.parity.runners import ParityError
from unroll_export.steps.folding import one_line
from unroll_export.steps.reading import Source
from unroll_export.weight_files import ImportRefusedError

PREFIX_BOUND = 1e-4
"""Difference, relative to outputs above 1, that rounding can make over the steps of the proof."""
PREFIXES = 9
"""Timesteps of a drawn sequence."""


class Original(Protocol):
    """A network of whole sequences, which steps are proven against.

    Attributes:
        steps: Timesteps that it is fixed to; None if it takes any.
    """

    steps: int | None

    @property
    def length(self) -> int:
        """Timesteps of the sequence that is drawn."""

    def probes(self) -> Iterable[Float32Array]:
        """The sequences of the proof, [time, *shape]."""

    def ends(self, values: Float32Array) -> Mapping[str, NDArray[Any]]:
        """The outputs by name after the last of some steps [time, *shape] of one sequence."""


class SequenceGraph:
    """A graph of whole sequences, which onnxruntime runs as it is, without optimizations.

    Args:
        source: The file; its constants are set.
        extra: Values that are outputs too.

    Raises:
        ImportRefusedError: it can't be loaded, or has other inputs than values [batch, time, features].

    Attributes:
        value: Its only input, [batch, time, *shape] or [time, batch, *shape].
        shape: Dimensions of a timestep; empty for one number.
        batch_first: True if its values are [batch, time, features]; set once known.
        steps: Timesteps that it is fixed to; None if it takes any.
        time_axes: Place of the time in each output, by name; None if it gives the last step's alone.
    """

    def __init__(self, source: Source, extra: list[str]) -> None:
        if len(source.inputs) != 1:
            names = ", ".join(str(value) for value in source.inputs)
            raise ImportRefusedError(
                f"{source.file}: one input of values is expected, it has {names}; --set sets others"
            )
        self.value = source.inputs[0]
        dims = self.value.dims or ()
        self.shape = tuple(dim for dim in dims[2:] if isinstance(dim, int))
        if len(dims) < 2 or len(self.shape) != len(dims) - 2:
            raise ImportRefusedError(f"{self.value}: values [batch, time, features] or ids [batch, time] expected")
        self.outputs = [value.name for value in source.outputs]
        self.batch_first = True
        self.steps: int | None = None
        self.time_axes: dict[str, int | None] = {}
        model = ModelProto()
        model.CopyFrom(source.model)
        known = {output.name for output in model.graph.output}
        model.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in extra if name not in known
        )
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
        try:
            self._session = step_session(model.SerializeToString(), optimized=False)
        except Exception as error:
            raise ImportRefusedError(f"onnxruntime can't load the graph: {one_line(error)}") from error

    @property
    def length(self) -> int:
        """Timesteps of the proof's sequence."""
        return self.steps or PREFIXES

    def run(self, names: list[str], values: Float32Array) -> list[NDArray[Any]]:
        """Runs the graph on values laid out as it takes them."""
        try:
            found: list[NDArray[Any]] = self._session.run(names, {self.value.name: values.astype(self.value.dtype)})
        except Exception as error:
            problem = f"the graph doesn't run on {list(values.shape)}: {one_line(error)}"
            raise ImportRefusedError(problem) from error
        return found

    def probes(self) -> list[Float32Array]:
        """The sequences of the proof: one that is drawn, [time, *shape]."""
        return [self.draw(np.random.default_rng(4), self.length)]

    def ends(self, values: Float32Array) -> dict[str, Float32Array]:
        """The outputs after the last of some steps [time, *shape] of one sequence."""
        laid_out = values[np.newaxis] if self.batch_first else values[:, np.newaxis]
        ends = {}
        for name, array in zip(self.outputs, self.run(self.outputs, laid_out), strict=True):
            axis = self.time_axes[name]
            ends[name] = array if axis is None else array.take(-1, axis)
        return ends

    def measure(self, first: str) -> None:
        """Finds the time dimension of the input and of each output.

        Args:
            first: Name of the first recurrent node's input, [time, batch, features].

        Raises:
            ImportRefusedError: the graph is fixed to several sequences, or to one timestep.
        """
        dims = self.value.dims or ()

        def run(names: list[str], batch: int, time: int) -> list[NDArray[Any]]:
            return self.run(names, np.zeros((*self._sizes(batch, time), *self.shape), np.float32))

        one, other = self._sizes(2, 5)
        (seen,) = run([first], 2, 5)
        self.batch_first = one == other or seen.shape[:2] == (other, one)
        if not self.batch_first and seen.shape[:2] != (one, other):
            raise ImportRefusedError(f"{self.value}: none of its dimensions is the time of {first!r}")
        batch, time = dims[:2] if self.batch_first else dims[1::-1]
        if isinstance(batch, int) and batch > 1:
            raise ImportRefusedError(
                f"{self.value}: the batch is fixed at {batch}; export the model with a dynamic batch, or with 1"
            )
        if time == 1:
            raise ImportRefusedError(f"{self.value}: time is fixed at 1, so that the use of the states can't be proven")
        self.steps = time if isinstance(time, int) else None
        before, after = (run(self.outputs, 1, length) for length in (4, 7))
        for name, short, long in zip(self.outputs, before, after, strict=True):
            pairs = list(zip(short.shape, long.shape, strict=True))
            changing = (self.steps, self.steps) if self.steps and short.ndim > 2 else (4, 7)
            self.time_axes[name] = pairs.index(changing) if changing in pairs else None

    def initial_values(self, names: list[str]) -> dict[str, NDArray[Any]]:
        """Returns the initial values of recurrent nodes, without the batch dimension.

        Raises:
            ImportRefusedError: it depends on the values of the sequence.
        """
        if not names:
            return {}
        rng = np.random.default_rng(6)
        runs = [self.run(names, self.draw(rng, *self._sizes(2, 2))) for _ in range(2)]
        begins = {}
        for name, one, other in zip(names, *runs, strict=True):
            if one.shape != other.shape or (one != other).any() or (one != one[:, :1]).any():
                raise ImportRefusedError(f"{name!r} begins a recurrent node, and depends on the values of the sequence")
            begins[name] = one[:, 0]
        return begins

    def draw(self, rng: np.random.Generator, *sizes: int) -> Float32Array:
        """Returns random values, [*sizes, *shape]; zeros and ones where the graph takes whole numbers."""
        shape = (*sizes, *self.shape)
        whole = self.value.dtype.kind in "iu"
        return (rng.integers(0, 2, shape) if whole else rng.standard_normal(shape)).astype(np.float32)

    def _sizes(self, batch: int, time: int) -> list[int]:
        """The first two dimensions of values, as far as the file leaves them open."""
        wanted = (batch, time) if self.batch_first else (time, batch)
        dims = (self.value.dims or ())[:2]
        return [dim if isinstance(dim, int) else size for dim, size in zip(dims, wanted, strict=True)]


def prove_prefixes(original: Original, steps: Callable[[Float32Array], Float32Array], names: list[str]) -> float:
    """Compares the original on every prefix of its sequences with the steps of the step graph.

    Args:
        original: The graph of sequences.
        steps: Computes the steps of a sequence [time, features]: outputs concatenated, [time, output_size].
        names: Outputs in that order.

    Returns:
        The largest difference, relative to outputs above 1.

    Raises:
        ParityError: an output is not what the steps give. The message names it, and the first such prefix.
    """
    worst = 0.0
    for values in original.probes():
        found = steps(values.reshape(len(values), -1))
        for end in [len(values)] if original.steps else range(1, len(values) + 1):
            ends = original.ends(values[:end])
            begin = 0
            for name in names:
                expected = ends[name].astype(np.float64).reshape(-1)
                given = found[end - 1, begin : begin + expected.size]
                begin += expected.size
                difference = float((np.abs(given - expected) / np.maximum(np.abs(expected), 1)).max(initial=0.0))
                worst = max(worst, difference)
                if not difference <= PREFIX_BOUND:
                    raise ParityError(
                        f"output {name!r} for the first {end} steps is not what the steps give (off by "
                        f"{difference:.2g}): it looks at more than the past (pooling, attention or normalization over "
                        "time?); --form whole, or whole=True, serves it for whole sequences only"
                    )
    return worst
