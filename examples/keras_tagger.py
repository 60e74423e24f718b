"""Tags the tokens of a sentence as they arrive, with a Keras LSTM tagger converted by tf2onnx.

The graph is that of a Keras model of Embedding, LSTM(return_sequences=True) and Dense(softmax). It takes whole
sentences of token ids, [batch, time]. The import turns it into a graph of one token, and proves that both agree.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from unroll_engine import Engine

WORDS = ["<pad>", "the", "cat", "sees", "a", "small", "dog"]
TAGS = ["noun", "verb", "other"]
EMBEDDING, UNITS = 8, 12


def keras_file() -> onnx.ModelProto:
    """Returns the graph that tf2onnx writes, with random weights."""
    rng = np.random.default_rng(7)
    shapes = {
        "embeddings": (len(WORDS), EMBEDDING),
        "W": (1, 4 * UNITS, EMBEDDING),
        "R": (1, 4 * UNITS, UNITS),
        "B": (1, 8 * UNITS),
        "kernel": (UNITS, len(TAGS)),
        "bias": (len(TAGS),),
    }
    tensors = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), name) for name, s in shapes.items()]
    tensors.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    nodes = [
        helper.make_node("Gather", ["embeddings", "tokens"], ["embedded"]),
        helper.make_node("Transpose", ["embedded"], ["by_time"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["by_time", "W", "R", "B"], ["Y"], name="tagger/lstm", hidden_size=UNITS),
        helper.make_node("Squeeze", ["Y", "axis"], ["states"]),
        helper.make_node("Transpose", ["states"], ["by_batch"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["by_batch", "kernel"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["tags"], axis=-1),
    ]
    inputs = [helper.make_tensor_value_info("tokens", onnx.TensorProto.INT64, ["batch", "time"])]
    outputs = [helper.make_tensor_value_info("tags", onnx.TensorProto.FLOAT, ["batch", "time", len(TAGS)])]
    graph = helper.make_graph(nodes, "tagger", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


def main() -> None:
    """Imports the file with the command, and tags a sentence in this process."""
    sentence = ["the", "small", "cat", "sees", "a", "dog"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save(keras_file(), folder / "tagger.onnx")
        (folder / "tags.txt").write_text("\n".join(TAGS))
        command = [str(Path(sys.executable).parent / "unroll-export"), "import", str(folder / "tagger.onnx")]
        out = ["--labels", str(folder / "tags.txt"), "--out", str(folder / "models" / "tagger")]
        subprocess.run([*command, *out], check=True)
        with Engine.load(folder / "models") as engine:
            sequence = engine.open()
            for word in sentence:
                tags = sequence.advance([[WORDS.index(word)]]).outputs["tags"][0]
                print(f"{word:6} {TAGS[int(tags.argmax())]:6} {tags.max():.2f}")


if __name__ == "__main__":
    main()
