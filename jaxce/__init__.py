"""Classification losses for JAX: pure functions with one exact derivative rule under them."""

from jaxce import imbalance as imbalance
from jaxce import torch as torch
from jaxce._checks import debug_checks as debug_checks
from jaxce._custom import custom_loss as custom_loss
from jaxce._distillation import distillation_loss as distillation_loss
from jaxce._elementwise import binary_cross_entropy as binary_cross_entropy
from jaxce._elementwise import binary_focal_loss as binary_focal_loss
from jaxce._elementwise import l1_loss as l1_loss
from jaxce._elementwise import mse_loss as mse_loss
from jaxce._linear import linear_cross_entropy as linear_cross_entropy
from jaxce._logits import LinearLogits as LinearLogits
from jaxce._losses import cross_entropy as cross_entropy
from jaxce._losses import focal_loss as focal_loss
from jaxce._losses import poly_loss as poly_loss
from jaxce._reduction import MeanParts as MeanParts
from jaxce._reduction import reduce_losses as reduce_losses
from jaxce._scores import multi_margin_loss as multi_margin_loss
from jaxce._scores import nll_loss as nll_loss
from jaxce._summary import Summary as Summary
from jaxce._summary import summarize as summarize
from jaxce._targets import SparseTargets as SparseTargets

__version__ = "0.2.0.dev0"

# Without `torch`: a star import would take that name from whoever has imported PyTorch.
__all__ = [
    "LinearLogits",
    "MeanParts",
    "SparseTargets",
    "Summary",
    "binary_cross_entropy",
    "binary_focal_loss",
    "cross_entropy",
    "custom_loss",
    "debug_checks",
    "distillation_loss",
    "focal_loss",
    "imbalance",
    "l1_loss",
    "linear_cross_entropy",
    "mse_loss",
    "multi_margin_loss",
    "nll_loss",
    "poly_loss",
    "reduce_losses",
    "summarize",
]
