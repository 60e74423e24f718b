"""ONNX Runtime on an imported graph, opened and checked: the base of the runtimes of steps and of whole sequences."""

from functools import cache

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from unroll_engine.runtimes.onnx import session_options
from unroll_engine.runtimes.step_graph import check_step_graph
from unroll_proto import bundle, step_model
from unroll_proto.v1 import bundle_pb2 as pb

RUN_FAILURES = (errors.Fail, errors.InvalidArgument, errors.RuntimeException)
"""Errors caused by values, such as an index out of range or a wrong shape."""

MAX_MEMORY = 2**32
"""Bound on the bytes of weights and intermediate values of all step models in the process; a run beyond it fails."""


class GraphRuntime:
    """Runs an imported graph on one core.

    Args:
        model: Content of `model.onnx`.
        step: Its description in the manifest.

    Raises:
        UnsupportedNetworkError: the graph has operators that can't be trusted.
        ValueError: its inputs and outputs are not those of the manifest.

    Attributes:
        bitwise: True if the proof found the same bits in any run.
    """

    name = "onnx"
    device = "cpu"
    artifact = bundle.ONNX_RNN
    variant = ""

    def __init__(self, model: bytes, step: pb.StepModel) -> None:
        check_step_graph(model)
        self.bitwise = step.bitwise
        self._session = step_session(model)
        self._inputs = [step_model.tensor_of(each) for each in step.inputs]
        self._outputs = [step_model.tensor_of(each) for each in step.outputs]
        self._states = [step_model.tensor_of(each.tensor) for each in step.states]
        self._width = sum(each.size for each in self._outputs)
        given = {each.name for each in self._session.get_inputs()}
        expected = {each.name for each in (*self._inputs, *self._states)}
        if given != expected:
            raise ValueError(f"it takes {sorted(given)}, the manifest says {sorted(expected)}")


def step_session(model: bytes, optimized: bool = True) -> onnxruntime.InferenceSession:
    """Opens a graph with the options used in serving and in its proof.

    Args:
        model: The graph, serialized ONNX.
        optimized: False to run its nodes as they are.
    """
    _bound_memory()
    options = session_options()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.use_env_allocators", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@cache
def _bound_memory() -> None:
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    # Grown as needed, not by doubling, so that the bound is on the memory in use.
    arena = onnxruntime.OrtArenaCfg({"max_mem": MAX_MEMORY, "arena_extend_strategy": 1})
    onnxruntime.create_and_register_allocator(memory, arena)
