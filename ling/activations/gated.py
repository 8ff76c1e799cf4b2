"""Gated activations, phi(g, u): g is the gate's, u the up projection's output, both `[..., F]`.

Each function is the definition; what it needs it holds in itself (see `register`). Derivatives are autograd's, and at a
kink the one that its comment or docs/activations.md names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ling.activations.table import Activation, Parameter, ResolvedActivation, register

if TYPE_CHECKING:
    from torch import Tensor

POWLU_PAPER = "PowLU: An Activation Function for Stable Pre-Training of LLMs, arXiv 2605.25704"
GLU_PAPER = "GLU Variants Improve Transformer, arXiv 2002.05202"
GELU_PAPER = "Gaussian Error Linear Units, arXiv 1606.08415"


def _steep(resolved: ResolvedActivation) -> str | None:
    m = resolved.params["m"]
    return f"powlu.m = {m}: for m < 1 the slope at 0 is infinite from the right" if m < 1 else None


@register(
    Activation(
        name="powlu",
        gated=True,
        summary="f(g)*u with f(x) = x^(m/(sqrt(x)+1)) * sigmoid(x) for x > 0, SiLU(x) else: tends to u, not to g*u",
        source=f"{POWLU_PAPER} (two-input form)",
        hidden_act="powlu",
        flops_per_element=11,
        parameters=(Parameter("m", 3.0, "strength of the power; the peak of f grows with it", gt=0, lt=10),),
        doubt=_steep,
    )
)
def powlu(g: Tensor, u: Tensor, *, m: float) -> Tensor:
    """f(g) * u."""
    positive = g > 0
    # `where` differentiates the branch that it does not take too, so both must be finite: the power sees 1 where the
    # gate is not positive, and at infinity, where its limit is 1.
    x = g.where(positive & (g < float("inf")), 1.0)
    power = (m / (x.sqrt() + 1) * x.log2()).exp2()
    return power.where(positive, g) * g.sigmoid() * u


@register(
    Activation(
        name="swiglu",
        gated=True,
        summary="SiLU(g)*u",
        source=GLU_PAPER,
        hidden_act="silu",
        flops_per_element=5,
    )
)
def swiglu(g: Tensor, u: Tensor) -> Tensor:
    """SiLU(g) * u."""
    return g * g.sigmoid() * u


@register(
    Activation(
        name="geglu",
        gated=True,
        summary="g * Phi(g) * u, the exact GELU (erf)",
        source=GLU_PAPER,
        hidden_act="gelu",
        flops_per_element=6,
    )
)
def geglu(g: Tensor, u: Tensor) -> Tensor:
    """GELU(g) * u."""
    # erfc keeps the relative accuracy of the left tail, where 1 + erf cancels
    return 0.5 * g * (g * -0.7071067811865476).erfc() * u


@register(
    Activation(
        name="geglu_tanh",
        gated=True,
        summary="GELU(g)*u in the tanh form: 0.5*g*(1 + tanh(sqrt(2/pi)*(g + 0.044715*g^3)))*u",
        source=f"{GLU_PAPER}; tanh form of {GELU_PAPER}",
        hidden_act="gelu_pytorch_tanh",
        flops_per_element=10,
    )
)
def geglu_tanh(g: Tensor, u: Tensor) -> Tensor:
    """GELU(g) * u with GELU's tanh form."""
    # (1 + tanh z)/2 = sigmoid(2z), which does not cancel; beyond 100 it is constant, and the cube may overflow
    x = g.clamp(-100.0, 100.0)
    return g * (1.5957691216057308 * (x + 0.044715 * x * x * x)).sigmoid() * u


@register(
    Activation(
        name="quick_geglu",
        gated=True,
        summary="g * sigmoid(1.702*g) * u",
        source=f"{GLU_PAPER}; sigmoid form of {GELU_PAPER}",
        hidden_act="quick_gelu",
        flops_per_element=6,
    )
)
def quick_geglu(g: Tensor, u: Tensor) -> Tensor:
    """GELU(g) * u with GELU's sigmoid form."""
    return g * (1.702 * g).sigmoid() * u


@register(
    Activation(
        name="reglu",
        gated=True,
        summary="max(0, g)*u",
        source=GLU_PAPER,
        hidden_act="relu",
        flops_per_element=2,
    )
)
def reglu(g: Tensor, u: Tensor) -> Tensor:
    """ReLU(g) * u."""
    return g.relu() * u


@register(
    Activation(
        name="swiglu_clip",
        gated=True,
        summary="g' * sigmoid(alpha*g') * (u' + beta) with g' = min(g, limit), u' = clip(u, -limit, limit)",
        source="clamp before the SiLU: gpt-oss (7, 1.702, 1), arXiv 2508.10925; DeepSeek-V4 (10, 1, 0)",
        hidden_act="swiglu_clip",
        flops_per_element=10,
        parameters=(
            Parameter("limit", 7.0, "largest gate, and largest size of up", ge=0, per_layer=True, can_be_off=True),
            Parameter("alpha", 1.0, "slope inside the sigmoid", gt=0),
            Parameter("beta", 0.0, "added to the clipped up"),
        ),
    )
)
def swiglu_clip(g: Tensor, u: Tensor, *, limit: float, alpha: float, beta: float) -> Tensor:
    """SwiGLU of inputs that are clamped before; the gradient passes on the limit itself."""
    g = g.clamp(max=limit)
    u = u.clamp(-limit, limit)
    return g * (alpha * g).sigmoid() * (u + beta)


@register(
    Activation(
        name="swiglu_clip_post",
        gated=True,
        summary="min(SiLU(g), limit) * clip(u, -limit, limit)",
        source="clamp after the SiLU: Ling-3.0-flash and Step-3.5, in their last layers",
        hidden_act="swiglu_clip_post",
        flops_per_element=8,
        parameters=(
            Parameter("limit", 7.0, "largest SiLU(g), and largest size of up", ge=0, per_layer=True, can_be_off=True),
        ),
    )
)
def swiglu_clip_post(g: Tensor, u: Tensor, *, limit: float) -> Tensor:
    """SwiGLU with its two factors clamped; the gradient passes on the limit itself."""
    return (g * g.sigmoid()).clamp(max=limit) * u.clamp(-limit, limit)


@register(
    Activation(
        name="situ_glu",
        gated=True,
        summary="beta1*tanh(g/beta1)*sigmoid(g) * beta2*tanh(u/beta2): never more than beta1*beta2",
        source="SiTU of Kimi K3 (beta1 4, beta2 25)",
        hidden_act="situ_glu",
        flops_per_element=11,
        parameters=(
            Parameter("beta1", 4.0, "bound of the gate's factor", gt=0),
            Parameter("beta2", 25.0, "bound of the up projection's factor", gt=0),
        ),
    )
)
def situ_glu(g: Tensor, u: Tensor, *, beta1: float, beta2: float) -> Tensor:
    """SwiGLU with both factors bounded by a tanh."""
    return beta1 * (g / beta1).tanh() * g.sigmoid() * (beta2 * (u / beta2).tanh())


@register(
    Activation(
        name="fatreglu",
        gated=True,
        summary="g*u where g >= t, else 0",
        source="FATReLU in ProSparse, arXiv 2402.13516",
        hidden_act="fatreglu",
        flops_per_element=2,
        parameters=(Parameter("t", 0.01, "gates below it count as zero", ge=0),),
    )
)
def fatreglu(g: Tensor, u: Tensor, *, t: float) -> Tensor:
    """ReGLU with a threshold above 0; on the threshold the gradient passes."""
    return g.masked_fill(g < t, 0.0) * u
