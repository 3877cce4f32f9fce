"""Linear layers with 8-bit weights, for fast_wan.py."""

from __future__ import annotations

import torch
from torch.nn import functional as F

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448


class Float8Linear(torch.nn.Linear):  # the base class is what diffusers' group offload looks for
    """A linear layer whose weights take half of bf16's memory.

    Every row of them is scaled to float8's range: without that, as in diffusers' layerwise casting,
    Wan's small weights lose precision. With `multiply` every row of the input is scaled and cast
    too, and the GPU multiplies in 8 bits.
    """

    def __init__(self, layer: torch.nn.Linear, multiply: bool):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.multiply = multiply
        weight, scale = to_float8(layer.weight.detach())
        self.weight = torch.nn.Parameter(weight, requires_grad=False)  # (out, in)
        self.register_buffer("scale", scale)  # (out, 1), float32
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(.., in) to (.., out), in the input's dtype."""
        if not self.multiply:
            return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)
        rows, scale = to_float8(x.flatten(0, -2))
        product = torch._scaled_mm(
            rows, self.weight.t(), scale_a=scale, scale_b=self.scale.t(), bias=self.bias,
            out_dtype=x.dtype, use_fast_accum=True)
        return product.unflatten(0, x.shape[:-1])


def to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, m) as float8, and the float32 scale of each row (n, 1)."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (rows / scale).to(FLOAT8), scale


def store_in_8_bits(blocks: torch.nn.Module, multiply: bool) -> None:
    """Puts a Float8Linear in the place of every linear layer."""
    for parent in list(blocks.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                setattr(parent, name, Float8Linear(layer, multiply))
