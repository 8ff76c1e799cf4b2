"""An independent quantiser to e4m3 with block scales, in plain torch: Transformer Engine's Float8BlockScaling, 1D."""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128


def quantize_rows(y: Tensor, largest: float, power_of_2: bool) -> tuple[Tensor, Tensor]:
    """Bytes [T, C] and inverse scales [ceil(C/128), T up to a multiple of 4] of y [T, C], fp32.

    largest: the largest number of the type that y is stored in; the scale where 448 / amax overflows.
    """
    tokens, width = y.shape
    blocks = pad(y, (0, -width % BLOCK)).reshape(tokens, -1, BLOCK)
    amax = blocks.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(-1)
    # not 448.0 / amax, which torch computes as a reciprocal and a product
    scale = (torch.full_like(amax, 448.0) / amax).where((amax > 0) & (amax < float("inf")), 1.0)
    scale = scale.where(scale < float("inf"), largest)
    if power_of_2:
        mantissa, exponent = torch.frexp(scale)
        assert ((mantissa >= 0.5) & (mantissa < 1)).all()
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    scaled = blocks * scale.unsqueeze(-1)
    e4m3 = scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    e4m3 = e4m3.masked_fill(scaled.isnan(), 0x7F)
    inverse = pad((1.0 / scale).T, (0, -tokens % 4), value=1.0)
    return e4m3.reshape(tokens, -1)[:, :width], inverse


def quantize(y: Tensor, power_of_2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, their inverse scales, columns (transposed), their inverse scales of y [T, C] in fp32, bf16 or fp16."""
    largest, wide = torch.finfo(y.dtype).max, y.float()
    return *quantize_rows(wide, largest, power_of_2), *quantize_rows(wide.T.contiguous(), largest, power_of_2)


def dequantize_rows(rows: Tensor, scale_inv: Tensor) -> Tensor:
    """[T, C] in fp32 of e4m3 [T, C] and its inverse scales."""
    tokens, width = rows.shape
    return rows.float() * scale_inv[:, :tokens].T.repeat_interleave(BLOCK, 1)[:, :width]
