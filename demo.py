"""`make demo`: trains, exports, serves, classifies and streams real speech, and says what happened.

Everything is done by the commands a user types; only the comparison with eager PyTorch is done here.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from unroll_client import Client
from unroll_export.runs import TrainedRun, load_run
from unroll_export.sources import japanese_vowels_files
from unroll_proto.sequences import Sequence, read_sequences

BIN = Path(sys.executable).parent
FOLDER = Path("demo")
RUN = FOLDER / "runs" / "jv"
MODELS = FOLDER / "models"
SHOWN_UNITS = 3

console = Console(highlight=False, width=110)


def main() -> None:
    """Runs the whole road once; exits with 1 where the served model is not the trained one."""
    console.rule("1. Train a SimpleRNN on Japanese vowels: 9 speakers, 12 features, 7 to 29 steps")
    command("unroll-train", "--data", "japanese-vowels", "--out", RUN, "--overwrite")
    command("unroll-train", "report", RUN, "-o", FOLDER / "report.png")
    console.rule("2. Export it to ONNX and TorchScript, with proof")
    command("unroll-export", RUN, "--out", MODELS / "jv")
    trained = load_run(RUN)
    test_file = FOLDER / "vowels_test.ts"
    shutil.copyfile(japanese_vowels_files()[1], test_file)
    vowels = list(read_sequences(test_file))
    console.rule("3. Serve it")
    serve = ("unroll-serve", "--models", str(MODELS), "--listen", "127.0.0.1:0", "--log-level", "warning")
    with serving(*serve) as address, Client(address) as client:
        console.rule(f"4. Classify all {len(vowels)} test sequences, as they are: no padding")
        same = classify(client, trained, vowels)
        console.rule("5. Stream one sequence and watch its hidden state")
        same &= stream(client, trained, vowels[3])
        console.rule("6. Serve the page and the REST API beside it, and classify by HTTP")
        web = ("unroll", "web", "--server", address, "--listen", "127.0.0.1:0", "--log-level", "warning")
        with serving(*web) as url:
            same &= by_http(client, url, vowels[3])
    console.rule("What now")
    console.print(
        f"  .venv/bin/unroll-serve --models {MODELS}\n"
        f"  .venv/bin/unroll web --models {MODELS} --data {test_file}, then open http://127.0.0.1:8080\n"
        "  .venv/bin/unroll models\n"
        f"  .venv/bin/unroll classify {test_file} --model jv -o labels.parquet\n"
        f"  .venv/bin/unroll stream {test_file} --model jv --index 3\n"
        f"  {FOLDER / 'report.png'} shows how the training went, and where its gradients vanish\n"
        "  README.md has the client in six lines; docs/ has the rest",
        soft_wrap=True,
    )
    sys.exit(0 if same else 1)


def command(name: str, *arguments: str | Path) -> None:
    """Runs one of the installed commands; ends the demo with its exit code where it fails."""
    console.print("$", name, *arguments, soft_wrap=True)
    done = subprocess.run([BIN / name, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """A command that serves on a free port, drained at the end; gives its address."""
    console.print("$", *arguments, soft_wrap=True)
    with subprocess.Popen([BIN / arguments[0], *arguments[1:]], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        announcement = process.stdout.readline().strip()
        if not announcement:
            sys.exit(process.wait())
        console.print(announcement)
        try:
            yield announcement.split(" on ")[1].split()[0]
        finally:
            process.terminate()
            console.print(f"{arguments[0]} drained and exited with {process.wait()}")


def eager(trained: TrainedRun, sequence: Sequence) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits [steps, classes] and states [steps, hidden] of one sequence by eager PyTorch."""
    with torch.inference_mode():
        logits, states, _ = trained.model.unroll(torch.from_numpy(sequence.values)[None])
    return logits[0].numpy(), states[0].numpy()


def classify(client: Client, trained: TrainedRun, vowels: list[Sequence]) -> bool:
    """Classifies the test split through the server; returns whether every label is eager's."""
    served = client.classify([sequence.values for sequence in vowels], model="jv")
    expected = np.stack([eager(trained, sequence)[0][-1] for sequence in vowels])
    labels = [trained.class_labels[index] for index in expected.argmax(axis=1)]
    agree: int = sum(label == other for label, other in zip(served.labels, labels, strict=True))
    right = sum(label == sequence.label for label, sequence in zip(served.labels, vowels, strict=True))
    console.print(f"test accuracy as served: {right / len(vowels):.4f} ({right} of {len(vowels)})")
    console.print(f"labels equal to eager PyTorch's: {agree} of {len(vowels)}")
    console.print(f"largest difference of a logit from eager PyTorch: {np.abs(served.logits - expected).max():.1e}")
    return agree == len(vowels)


def stream(client: Client, trained: TrainedRun, sequence: Sequence) -> bool:
    """Streams a sequence step by step, shows its states beside eager's; returns whether they are within 1e-5."""
    logits, states = eager(trained, sequence)
    table = Table("step", "h[0:3] as served", "h[0:3] of eager", "|h|", "difference", "class so far")
    difference = 0.0
    with client.unroll("jv", states=True, logits=True) as served:
        for step, x in enumerate(sequence.values):
            answer = served.send(x[np.newaxis])
            assert answer.states is not None
            assert answer.logits is not None
            state = answer.states[0]
            gap = float(np.abs(state - states[step]).max())
            difference = max(difference, gap, float(np.abs(answer.logits[0] - logits[step]).max()))
            units = [" ".join(f"{unit:+.4f}" for unit in vector[:SHOWN_UNITS]) for vector in (state, states[step])]
            label = trained.class_labels[int(answer.logits[0].argmax())]
            table.add_row(str(step), *units, f"{np.linalg.norm(state):.3f}", f"{gap:.1e}", label)
    console.print(table)
    console.print(f"speaker {sequence.label}; largest difference of a state or logit from eager: {difference:.1e}")
    return difference <= 1e-5


def by_http(client: Client, url: str, sequence: Sequence) -> bool:
    """Classifies a sequence by REST, and asks for the page; returns whether both answer, with gRPC's bits."""
    content = json.dumps({"sequences": [sequence.values.tolist()]}).encode()
    request = Request(f"{url}/v1/models/jv:classify", content, {"content-type": "application/json"})  # noqa: S310
    with urlopen(request) as answer:  # noqa: S310
        (result,) = json.load(answer)["results"]
    with urlopen(url) as page:  # noqa: S310
        size = len(page.read())
    served = client.classify([sequence.values], model="jv")
    same = np.array(result["logits"], np.float32).tobytes() == served.logits.tobytes()
    console.print(
        f"speaker {result['label']}; the bits are {'' if same else 'not '}those of gRPC; a page of {size} bytes"
    )
    return same


if __name__ == "__main__":
    main()
