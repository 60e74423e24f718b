"""Training of recurrent classifiers, and export of recurrent networks with proof that they compute the same."""

from unroll_export.model import SimpleGRU, SimpleLSTM, SimpleRNN
from unroll_export.modules import export

__all__ = ["SimpleGRU", "SimpleLSTM", "SimpleRNN", "export"]
