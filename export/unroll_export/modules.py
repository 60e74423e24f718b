"""Export of any PyTorch module of recurrent layers, with proof against the module itself."""

import hashlib
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from unroll_engine.models.spec import Float32Array
from unroll_export.exporting import export_run
from unroll_export.importing import import_weights, imported_run
from unroll_export.model import RecurrentClassifier
from unroll_export.parity.runners import ParityError
from unroll_export.steps.eager_module import EagerModule
from unroll_export.steps.importing import import_step
from unroll_export.steps.plan import Options
from unroll_export.steps.sequence_graph import prove_prefixes
from unroll_export.steps.step_module import StepModule
from unroll_export.weight_files import ImportRefusedError
from unroll_export.whole import export_whole
from unroll_proto.bundle import check_name


def export(
    module: nn.Module,
    *,
    name: str,
    example: Tensor,
    labels: Sequence[str] = (),
    models: str | Path = "models",
    whole: bool | None = None,
) -> Path:
    """Writes a module as the next version of a model, proven on every prefix of sequences to compute what it computes.

    A module of one nn.RNN, nn.LSTM or nn.GRU and a linear readout becomes a model like those that are trained here,
    which the step kernel runs. Any other becomes a step model, with its outputs by name.

    Args:
        module: Recurrent layers, or cells in a loop over time, and what works on each step; not changed.
        name: Name of the model.
        example: An input like those in use, [batch, time, features] or ids [batch, time]; [time, batch, ...] if the
            recurrent layers are not batch first.
        labels: Class names of the first output.
        models: Folder of the models.
        whole: True to serve whole sequences only, with outputs of a sequence: what a module needs that looks at more
            than the past, as by attention or pooling over time. None if a layer is bidirectional, which needs it too.

    Returns:
        The folder of the version, `models/name/version`.

    Raises:
        ImportRefusedError: a part has no steps, or can't be exported. The message names it.
        ParityError: the steps compute something else, as with pooling over time. Nothing is left behind.
        BundleError: the name can't be a model's.
        OSError: the folder can't be written to.
    """
    check_name(name)
    original, out = EagerModule(module, example), Path(models) / name
    if whole is None:
        whole = any(getattr(each, "bidirectional", False) for each in original.module.modules())
    if whole:
        return export_whole(original, out, labels).path
    if classifier := _classifier(original):
        content = save({key: value.contiguous() for key, value in classifier.state_dict().items()})
        run = imported_run(classifier, type(module).__name__, hashlib.sha256(content).hexdigest(), labels)
        return export_run(run, out).path
    step = StepModule(original)
    stepped = step.stepped()
    try:
        imported = import_step(stepped.source, Options(), out, labels, stepped=stepped)
    except ParityError as error:
        found = filter(None, map(step.first_difference, original.probes()))
        raise ParityError("; the first difference is in ".join([str(error), *islice(found, 1)])) from error
    if imported.proven.note:
        warnings.warn(imported.proven.note, stacklevel=2)
    return imported.path


_FUNCTIONS = """
linear dropout __get__ __getitem__ size dim select narrow squeeze unsqueeze transpose permute swapaxes movedim
contiguous view reshape flatten unflatten to float zeros new_zeros zeros_like
"""
_READOUT = frozenset(_FUNCTIONS.split())
"""Functions of torch around a recurrent layer and a readout; not a clamp, which no sequence of the proof may meet."""


def _classifier(original: EagerModule) -> RecurrentClassifier[Any] | None:
    """Builds the classifier that computes what a module computes; None if there is none."""
    own = type(original.module).forward is RecurrentClassifier.forward
    layers = [each for each in original.module.modules() if isinstance(each, nn.RNN | nn.LSTM | nn.GRU)]
    outputs = list(original.time_axes)
    if len(layers) != 1 or len(outputs) != 1 or not (own or original.functions <= _READOUT):
        return None
    try:
        relu = getattr(layers[0], "nonlinearity", "tanh") == "relu"
        model = import_weights(original.module.state_dict(), nonlinearity="relu" if relu else "tanh")
        first = next(original.probes())
        if original.shape != (model.rnn.input_size,) or original.ends(first)[outputs[0]].size != model.fc.out_features:
            return None
        prove_prefixes(original, partial(_logits, model), outputs)
    except (ImportRefusedError, ParityError):
        return None
    return model


@torch.no_grad()
def _logits(model: RecurrentClassifier[Any], values: Float32Array) -> Float32Array:
    """Computes the logits of every step of one sequence [time, features]."""
    logits: Float32Array = model.unroll(torch.from_numpy(values)[None])[0][0].numpy()
    return logits
