"""The TorchScript artifact; only torch.jit's own deprecation warning is silenced."""

import io
import os
import subprocess
import sys
import warnings

import pytest
import torch
from support.models import random_network

from unroll_export.graphs.torchscript import build_torchscript, quiet


def loaded(content: bytes) -> torch.jit.ScriptModule:
    with quiet():
        module: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(content))  # type: ignore[no-untyped-call]
    return module


def test_computes_what_eager_does_without_gradients() -> None:
    network = random_network(layers=2)
    module = loaded(build_torchscript(network))
    x, state = torch.randn(5, 7, 3), torch.rand(2, 5, 8)
    for got, expected in zip(module(x, state), network.unroll(x, state), strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_leaves_the_model_as_it_is() -> None:
    network = random_network().train()
    build_torchscript(network)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_same_model_gives_the_same_bytes_in_every_process() -> None:
    program = (
        "import hashlib, torch; from unroll_export import SimpleRNN; torch.manual_seed(0);"
        "from unroll_export.graphs.torchscript import build_torchscript;"
        "print(hashlib.sha256(build_torchscript(SimpleRNN(3, 8, 4, 2))).hexdigest())"
    )
    digests = {
        subprocess.check_output([sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_weights_stay_weights_that_a_device_map_moves() -> None:
    module = loaded(build_torchscript(random_network()))
    names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    assert names == set(random_network().state_dict())


def test_says_nothing_of_deprecation() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_torchscript(random_network())


def test_silences_that_notice_alone() -> None:
    with quiet():
        warnings.warn("`torch.jit.script` is deprecated. Please switch.", DeprecationWarning, stacklevel=1)
        with pytest.warns(DeprecationWarning, match="something else"):
            warnings.warn("something else is deprecated", DeprecationWarning, stacklevel=1)
