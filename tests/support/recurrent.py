"""Recurrent networks of every kind, as PyTorch modules and as ONNX graphs of the standard operators."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before")
"""`gru_reset_before` has no PyTorch module: its reference is `float64`."""

_ONNX_GATES = {"RNN": (0,), "LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}  # among PyTorch's: LSTM i, f, g, o; GRU r, z, n


@dataclass(frozen=True)
class RecurrentNetwork:
    """A network of random weights: standardization, recurrent layers, linear readout of every step.

    Attributes:
        cell: One of CELLS.
        rnn: The layers; of `gru_reset_before` their weights only.
        fc: The readout.
        mean: [input_size].
        std: [input_size].
    """

    cell: str
    rnn: nn.RNNBase
    fc: nn.Linear
    mean: torch.Tensor
    std: torch.Tensor

    @property
    def state_tensors(self) -> int:
        return 2 if self.cell == "lstm" else 1

    def eager(self, x: Float32Array, state: tuple[Float32Array, ...]) -> tuple[Float32Array, Float32Array]:
        """Computes logits and states of every step by eager PyTorch, time-major: x [steps, lanes, input_size]."""
        assert self.cell != "gru_reset_before"
        tensors = tuple(torch.from_numpy(tensor) for tensor in state)
        with torch.inference_mode():
            inputs = (torch.from_numpy(x) - self.mean) / self.std
            states, _ = self.rnn(inputs, tensors if self.cell == "lstm" else tensors[0])
            return self.fc(states).numpy(), states.numpy()

    def float64(
        self, x: Float32Array, state: tuple[Float32Array, ...]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Computes logits and states of every step in float64 by numpy; see `eager` for the arguments."""
        values = (x.astype(np.float64) - self.mean.numpy()) / self.std.numpy()
        for layer in range(self.rnn.num_layers):
            parts = [tensor[layer].astype(np.float64) for tensor in state]
            values = np.stack(list(self._layer64(layer, values, parts)))
        return values @ self.fc.weight.double().detach().numpy().T + self.fc.bias.double().detach().numpy(), values

    def _layer64(
        self, layer: int, values: NDArray[np.float64], state: list[NDArray[np.float64]]
    ) -> Iterator[NDArray[np.float64]]:
        w, r, b, c = (array.astype(np.float64) for array in self._weights(layer))
        hidden, h = self.rnn.hidden_size, state[0]
        for x in values:
            of_x, of_h = (np.split(part, w.shape[0] // hidden, axis=1) for part in (x @ w.T + b, h @ r.T + c))
            if self.cell == "rnn_tanh":
                h = np.tanh(of_x[0] + of_h[0])
            elif self.cell == "rnn_relu":
                h = np.maximum(of_x[0] + of_h[0], 0)
            elif self.cell == "lstm":
                i, f, g, o = (one + two for one, two in zip(of_x, of_h, strict=True))
                state[1] = _sigmoid(f) * state[1] + _sigmoid(i) * np.tanh(g)
                h = _sigmoid(o) * np.tanh(state[1])
            else:
                reset, update = (_sigmoid(of_x[gate] + of_h[gate]) for gate in (0, 1))
                if self.cell == "gru":
                    new = np.tanh(of_x[2] + reset * of_h[2])
                else:
                    new = np.tanh(of_x[2] + (reset * h) @ r[2 * hidden :].T + c[2 * hidden :])
                h = (1 - update) * new + update * h
            yield h

    def _weights(self, layer: int) -> list[Float32Array]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [getattr(self.rnn, f"{name}_l{layer}").detach().numpy() for name in names]

    def to_onnx(self) -> bytes:
        """The graph, batch-major as `unroll-export` writes `model.onnx`; an LSTM's second state is `initial_cell`."""
        layers, hidden = self.rnn.num_layers, self.rnn.hidden_size
        operator = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM"}.get(self.cell, "GRU")
        tensors = ["state", "cell"][: self.state_tensors]
        weights: dict[str, NDArray[np.generic]] = {"mean": self.mean.numpy(), "std": self.std.numpy()}
        nodes = [
            helper.make_node("Sub", ["input", "mean"], ["centred"]),
            helper.make_node("Div", ["centred", "std"], ["standardized"]),
            helper.make_node("Transpose", ["standardized"], ["steps"], perm=[1, 0, 2]),
        ]
        weights |= {"ones": np.ones(layers, np.int64), "axis": np.array([1])}
        for name in tensors:
            parts = [f"initial_{name}_l{layer}" for layer in range(layers)]
            nodes.append(helper.make_node("Split", [f"initial_{name}", "ones"], parts, axis=0))
        steps = "steps"
        attributes: dict[str, Any] = {"activations": ["Relu"]} if self.cell == "rnn_relu" else {}
        if operator == "GRU":
            attributes = {"linear_before_reset": int(self.cell == "gru")}
        for layer in range(layers):
            gates = list(_ONNX_GATES[operator])
            w, r, *biases = (
                array.reshape(len(gates), hidden, -1)[gates].reshape(len(gates) * hidden, -1)
                for array in self._weights(layer)
            )
            weights |= {f"w{layer}": w[None], f"r{layer}": r[None], f"b{layer}": np.concatenate(biases).reshape(1, -1)}
            inputs = [
                steps,
                f"w{layer}",
                f"r{layer}",
                f"b{layer}",
                "",
                *(f"initial_{name}_l{layer}" for name in tensors),
            ]
            outputs = [f"directions_l{layer}", *(f"final_{name}_l{layer}" for name in tensors)]
            nodes.append(helper.make_node(operator, inputs, outputs, hidden_size=hidden, **attributes))
            steps = f"states_l{layer}"
            nodes.append(helper.make_node("Squeeze", [outputs[0], "axis"], [steps]))
        for name in tensors:
            parts = [f"final_{name}_l{layer}" for layer in range(layers)]
            nodes.append(helper.make_node("Concat", parts, [f"final_{name}"], axis=0))
        nodes += [
            helper.make_node("Transpose", [steps], ["states"], perm=[1, 0, 2]),
            helper.make_node("MatMul", ["states", "fc.weight"], ["readout"]),
            helper.make_node("Add", ["readout", "fc.bias"], ["logits"]),
        ]
        weights |= {"fc.weight": self.fc.weight.detach().numpy().T.copy(), "fc.bias": self.fc.bias.detach().numpy()}
        state, lead = (layers, "batch", hidden), ("batch", "time")
        takes = _values({"input": (*lead, self.rnn.input_size)} | {f"initial_{name}": state for name in tensors})
        gives = _values(
            {"logits": (*lead, self.fc.out_features), "states": (*lead, hidden)}
            | {f"final_{name}": state for name in tensors}
        )
        initializers = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()]
        graph = helper.make_graph(nodes, self.cell, takes, gives, initializer=initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()


def recurrent_network(
    cell: str, input_size: int, hidden_size: int, output_size: int, num_layers: int = 1, seed: int = 0
) -> RecurrentNetwork:
    """Makes a network; equal arguments give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = input_size, hidden_size, num_layers
        rnn: nn.RNNBase
        if cell.startswith("rnn"):
            rnn = nn.RNN(*sizes, nonlinearity="relu" if cell == "rnn_relu" else "tanh")
        else:
            rnn = nn.LSTM(*sizes) if cell == "lstm" else nn.GRU(*sizes)
        mean, std = torch.randn(input_size), torch.rand(input_size) + 0.5
        return RecurrentNetwork(cell, rnn.eval(), nn.Linear(hidden_size, output_size), mean, std)


def random_sequences(
    network: RecurrentNetwork, steps: int, lanes: int, seed: int = 0
) -> tuple[Float32Array, tuple[Float32Array, ...]]:
    """Draws values [steps, lanes, input_size] and an initial state, [num_layers, lanes, hidden_size] each."""
    rng = np.random.default_rng(seed)
    rnn = network.rnn
    shape = rnn.num_layers, lanes, rnn.hidden_size
    x = rng.standard_normal((steps, lanes, rnn.input_size), dtype=np.float32)
    return x, tuple(rng.uniform(-1, 1, shape).astype(np.float32) for _ in range(network.state_tensors))


def _values(shapes: Mapping[str, tuple[int | str, ...]]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]


def _sigmoid(x: Float64Array) -> Float64Array:
    return 1 / (1 + np.exp(-x))
