"""Names of the tensors in a checkpoint. Torch-free."""

from __future__ import annotations

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = "optimizer.state."


def state_key(name: str, key: str) -> str:
    """Name of the optimizer state `name` (`param`, `exp_avg`, `exp_avg_sq`) of the parameter stored under `key`."""
    return f"{STATE}{name}.{key}"


def scalars_kind(key: str) -> str | None:
    """The kind of FFN (`dense`, `shared`, `routed`) whose activation learns the scalars of this name; else None."""
    if key.startswith("activation_scalars."):
        return key.split(".")[1]
    if not key.endswith(".activation.scalars"):
        return None
    return "shared" if ".shared_experts." in key else "routed" if ".experts." in key else "dense"
