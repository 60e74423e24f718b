"""Probabilities and classes, against PyTorch's."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from unroll_engine.models.spec import Float32Array
from unroll_engine.readout import classify


@given(npst.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(-80, 80, width=32)))
def test_probabilities_and_classes_are_pytorch_s(logits: Float32Array) -> None:
    probabilities, indices = classify(logits)
    wide = torch.from_numpy(logits).double()
    if logits.shape[1] == 1:
        positive = torch.sigmoid(wide)
        expected = torch.cat([1 - positive, positive], dim=1)
        assert indices.tolist() == (logits[:, 0] > 0).astype(int).tolist()
    else:
        expected = torch.softmax(wide, dim=1)
        assert indices.tolist() == logits.argmax(axis=1).tolist()
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected.numpy(), rtol=1e-6, atol=1e-7)


@given(npst.arrays(np.float32, st.tuples(st.integers(2, 40), st.integers(1, 9)), elements=st.floats(-9, 9, width=32)))
def test_a_row_s_probabilities_have_the_same_bits_alone(logits: Float32Array) -> None:
    together, _ = classify(logits)
    for row in range(len(logits)):
        apart, _ = classify(logits[row : row + 1])
        assert apart.tobytes() == together[row : row + 1].tobytes()
