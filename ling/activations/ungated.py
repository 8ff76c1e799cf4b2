"""Un-gated activations, phi(x): fc1 is one projection, and x its output, `[..., F]`.

For equal parameters such an FFN is 3/2 as wide as a gated one. Each function is the definition; what it needs it holds
in itself (see `register`). At a kink the derivative is the one of the left branch unless a comment says otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ling.activations.table import Activation, Learnable, Parameter, ResolvedActivation, register

if TYPE_CHECKING:
    from torch import Tensor

GELU_PAPER = "Gaussian Error Linear Units, arXiv 1606.08415"
POLYCOM = "PolyCom (polynomial composition activations)"
THIRD = 1 / 3
CUBIC = (
    Learnable("a3", THIRD, "coefficient of the cube"),
    Learnable("a2", THIRD, "coefficient of the square"),
    Learnable("a1", THIRD, "coefficient of the first power"),
    Learnable("a0", 0.0, "constant"),
)


@register(
    Activation(
        name="relu",
        gated=False,
        summary="max(0, x)",
        source="Rectified Linear Units Improve Restricted Boltzmann Machines (Nair, Hinton)",
        hidden_act="relu",
        flops_per_element=1,
    )
)
def relu(x: Tensor) -> Tensor:
    """max(0, x)."""
    return x.relu()


@register(
    Activation(
        name="relu2",
        gated=False,
        summary="max(0, x)^2",
        source="Primer: Searching for Efficient Transformers for Language Modeling, arXiv 2109.08668",
        hidden_act="relu2",
        flops_per_element=2,
    )
)
def relu2(x: Tensor) -> Tensor:
    """max(0, x)^2."""
    return x.relu().square()


@register(
    Activation(
        name="gelu",
        gated=False,
        summary="x * Phi(x), exact (erf, not tanh)",
        source=GELU_PAPER,
        hidden_act="gelu",
        flops_per_element=5,
    )
)
def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function of x."""
    # erfc keeps the relative accuracy of the left tail, where 1 + erf cancels
    return 0.5 * x * (x * -0.7071067811865476).erfc()


@register(
    Activation(
        name="silu",
        gated=False,
        summary="x * sigmoid(x)",
        source="Sigmoid-Weighted Linear Units for Neural Network Function Approximation (Elfwing, Uchibe, Doya)",
        hidden_act="silu",
        flops_per_element=4,
    )
)
def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x * x.sigmoid()


@register(
    Activation(
        name="elu",
        gated=False,
        summary="x for x > 0, exp(x) - 1 else",
        source="Fast and Accurate Deep Network Learning by Exponential Linear Units (Clevert, Unterthiner, Hochreiter)",
        hidden_act="elu",
        flops_per_element=2,
    )
)
def elu(x: Tensor) -> Tensor:
    """ELU with alpha = 1, which has no kink."""
    # the exponential must be finite also where it is not taken
    return x.where(x > 0, x.clamp(max=0.0).expm1())


@register(
    Activation(
        name="selu",
        gated=False,
        summary="1.0507*x for x > 0, 1.0507*1.6733*(exp(x) - 1) else",
        source="Self-Normalizing Neural Networks (Klambauer, Unterthiner, Mayr, Hochreiter)",
        hidden_act="selu",
        flops_per_element=4,
    )
)
def selu(x: Tensor) -> Tensor:
    """ELU with the two constants that keep mean 0 and variance 1."""
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    return scale * x.where(x > 0, alpha * x.clamp(max=0.0).expm1())


@register(
    Activation(
        name="leaky_relu",
        gated=False,
        summary="x for x > 0, s*x else",
        source="Rectifier Nonlinearities Improve Neural Network Acoustic Models (Maas, Hannun, Ng); s may be learned",
        hidden_act="leaky_relu",
        flops_per_element=2,
        learnable=(Learnable("s", 0.01, "slope for x <= 0"),),
        learn="fixed",
    )
)
def leaky_relu(x: Tensor, *, scalars: Tensor) -> Tensor:
    """Leaky ReLU; with the slope learned, PReLU."""
    (s,) = scalars
    return x.where(x > 0, s * x)


@register(
    Activation(
        name="polyrelu",
        gated=False,
        summary="a3*r^3 + a2*r^2 + a1*r + a0 with r = max(0, x)",
        source=POLYCOM,
        hidden_act="polyrelu",
        flops_per_element=7,
        learnable=CUBIC,
    )
)
def polyrelu(x: Tensor, *, scalars: Tensor) -> Tensor:
    """A cubic in ReLU(x)."""
    a3, a2, a1, a0 = scalars
    r = x.relu()
    return ((a3 * r + a2) * r + a1) * r + a0


@register(
    Activation(
        name="polynorm",
        gated=False,
        summary="a3*N(x^3) + a2*N(x^2) + a1*N(x) + a0 with N(z) = z/sqrt(mean(z^2) + eps) over the token's whole FFN",
        source=POLYCOM,
        hidden_act="polynorm",
        flops_per_element=13,
        parameters=(Parameter("eps", 1e-6, "added to each mean square", gt=0),),
        learnable=CUBIC,
        rowwise=True,
    )
)
def polynorm(x: Tensor, *, eps: float, scalars: Tensor, rows: Any) -> Tensor:
    """A cubic in x whose powers are normalised. In fp32 the mean of x^6 overflows for |x| above 2.6e6."""
    a3, a2, a1, a0 = scalars
    square, cube = x * x, x * x * x
    # not rsqrt, whose derivative needs the ninth power of 1/x
    return (
        a3 * (cube / (rows.mean(cube * cube) + eps).sqrt())
        + a2 * (square / (rows.mean(square * square) + eps).sqrt())
        + a1 * (x / (rows.mean(square) + eps).sqrt())
        + a0
    )


@register(
    Activation(
        name="crrelu",
        gated=False,
        summary="max(0, x) + epsilon * x * exp(-x^2/2)",
        source="CRReLU (correction regularised ReLU)",
        hidden_act="crrelu",
        flops_per_element=7,
        learnable=(Learnable("epsilon", 0.01, "size of the correction"),),
    )
)
def crrelu(x: Tensor, *, scalars: Tensor) -> Tensor:
    """ReLU with a correction around 0; there the derivative is epsilon."""
    (epsilon,) = scalars
    return x.relu() + epsilon * x * (-0.5 * x * x).exp()


def _dead(resolved: ResolvedActivation) -> str | None:
    count = resolved.params["n"]
    scalars = resolved.initial_scalars()
    terms = list(zip(scalars[:count], scalars[count:], strict=True))
    if resolved.params["rho"] == "relu" and resolved.learn != "fixed" and (0, 0) in terms:
        return "series.rho = relu: a term with a = b = 0 gets no gradient and never learns; give series.a other values"
    return None


@register(
    Activation(
        name="series",
        gated=False,
        summary="sum over i of rho(a_i*x + b_i), n terms",
        source="series informed activation function of PanGu-pi; it names no initial values: the first term is rho(x)",
        hidden_act="series",
        flops_per_element=16,
        parameters=(
            Parameter("n", 2, "terms", ge=1, le=8, integer=True, in_math=False),
            Parameter("rho", "gelu", "function of each term", choices=("gelu", "relu", "silu", "tanh")),
        ),
        learnable=(
            Learnable("a", (1.0,), "slopes of the terms", length="n"),
            Learnable("b", (0.0,), "offsets of the terms", length="n"),
        ),
        doubt=_dead,
    )
)
def series(x: Tensor, *, rho: str, scalars: Tensor) -> Tensor:
    """A sum of shifted and scaled functions of one kind."""
    functions: dict[str, Any] = {
        "gelu": lambda z: 0.5 * z * (z * -0.7071067811865476).erfc(),
        "relu": lambda z: z.relu(),
        "silu": lambda z: z * z.sigmoid(),
        "tanh": lambda z: z.tanh(),
    }
    slopes, offsets = scalars.chunk(2)
    return sum(functions[rho](a * x + b) for a, b in zip(slopes, offsets, strict=True))


@register(
    Activation(
        name="topk_relu",
        gated=False,
        summary="the k largest of max(0, x) of each token, 0 elsewhere; of equal ones those of the lowest index",
        source="top-k activation of the Lazy Neuron phenomenon",
        hidden_act="topk_relu",
        flops_per_element=3,
        parameters=(
            Parameter("k", None, "units of the whole FFN that a token keeps", ge=1, integer=True, within_width=True),
        ),
        rowwise=True,
    )
)
def topk_relu(x: Tensor, *, k: int, rows: Any) -> Tensor:
    """ReLU that keeps the k largest of each row."""
    r = x.relu()
    # of what is dropped nothing stays but nan
    return r.where(rows.largest(r, k), r.clamp(max=0.0))
