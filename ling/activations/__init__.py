"""FFN activations: the registry and its rows (without torch), and the module that a layer holds.

Importing the package fills the registry.
"""

from ling.activations import gated, ungated
from ling.activations.table import (
    ACTIVATIONS,
    Activation,
    Learnable,
    Parameter,
    ResolvedActivation,
    find,
    register,
    resolve,
)

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Learnable",
    "Parameter",
    "ResolvedActivation",
    "find",
    "gated",
    "register",
    "resolve",
    "ungated",
]
