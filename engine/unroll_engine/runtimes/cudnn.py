"""cuDNN: which networks it computes exactly enough, and the order of weights that it wants."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from unroll_engine.kernel.exact import ULPS, UNIT, UNITS

_NETWORKS = {1: torch.nn.RNN, 3: torch.nn.GRU, 4: torch.nn.LSTM}
"""PyTorch's networks by the number of their gates."""
_LAYER_WEIGHTS = 4
"""Tensors of a layer: weights of its input and of its state, and the biases of both."""
_setting = threading.Lock()
"""Held while cuDNN is on or off for a run, which is a setting of the process."""


@contextmanager
def cudnn(enabled: bool) -> Iterator[None]:
    """Turns cuDNN on or off in the context, without TF32, for one thread at a time."""
    with _setting, torch.backends.cudnn.flags(enabled=enabled, allow_tf32=False):
        yield


def prepare_for_cudnn(module: Any) -> bool:
    """Puts the weights of a network on a card in the order of cuDNN; returns False if cuDNN must not run it."""
    rnn, relu = module.rnn, "rnn_relu" in str(module.inlined_graph)
    names = [name for name, _ in rnn.named_parameters()]
    weights = [getattr(rnn, name) for name in names]
    (rows, input_size), hidden_size, layers = weights[0].shape, weights[1].shape[1], len(names) // _LAYER_WEIGHTS
    gates = rows // hidden_size
    # The mode of a network of tanh is 1, of ReLU 0.
    mode = {1: 0 if relu else 1, 4: 2, 3: 3}[gates]
    with torch.no_grad():
        torch._cudnn_rnn_flatten_weight(weights, _LAYER_WEIGHTS, input_size, mode, hidden_size, 0, layers, True, False)
    return relu or tanh_is_exact(gates, hidden_size, layers, "cuda")


@cache
@torch.inference_mode()
def tanh_is_exact(gates: int, hidden_size: int, layers: int, device: str) -> bool:
    """Returns True if PyTorch's tanh is within the bound of the proof in networks of a size.

    That of cuDNN 9.19 on an H100 is off by 2^-17 in those of 128 units, and by 2^-23 in those of 512.

    Args:
        gates: 1 of an RNN, 3 of a GRU, 4 of an LSTM.
        hidden_size: Units of a layer.
        layers: Number of layers.
        device: "cpu" or "cuda".
    """
    network = _NETWORKS[gates](hidden_size, hidden_size, layers).to(device)
    for parameter in network.parameters():
        parameter.zero_()
    # The state is the tanh of the features: other gates are open or closed.
    first = min(gates - 1, 2) * hidden_size
    network.weight_ih_l0[first : first + hidden_size] = torch.eye(hidden_size)
    if gates > 1:
        network.bias_ih_l0[:hidden_size] = 100
        network.bias_ih_l0[hidden_size : 2 * hidden_size] = -100
    x = torch.linspace(-4, 4, 64 * hidden_size, device=device).view(1, 64, hidden_size)
    with cudnn(enabled=True):
        final = network(x)[1]
    state = final[1] if isinstance(final, tuple) else final
    return bool((state[0].double() - x[0].double().tanh()).abs().max() <= (2 * ULPS + UNITS) * UNIT)
