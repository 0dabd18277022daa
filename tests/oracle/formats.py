"""Number formats of DeepSeek-V4 in torch: round to a grid and come back.

Rounding is by comparison with tables or by torch's own float8 cast, and the power-of-two scales come from exponents
of float64 quotients, so nothing here shares a formula with the package under test.
"""

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Midpoint i lies between code i and code i + 1. A tie goes to the code with an even mantissa, which is the even code.
E2M1_MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
E4M3_MAX, E2M1_MAX = 448.0, 6.0


def e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 code, ties to even mantissa, saturating at 6. fp32 [...] -> uint8 [...], the sign in bit 3."""
    x = x.float()
    magnitude = torch.zeros(x.shape, dtype=torch.uint8)
    for lower_code, midpoint in enumerate(E2M1_MIDPOINTS):
        tie_goes_up = lower_code % 2 == 1
        magnitude += (x.abs() >= midpoint) if tie_goes_up else (x.abs() > midpoint)
    return magnitude | (torch.signbit(x).to(torch.uint8) << 3)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [...] -> fp32 values [...]."""
    return torch.where(codes >= 8, -1.0, 1.0) * E2M1[(codes & 7).long()]


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest e4m3, ties to even, saturating at 448."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def power_of_two_scale(amax: torch.Tensor, floor: float, limit: float) -> torch.Tensor:
    """2^ceil(log2(max(amax, floor) / limit)) as fp32, exactly."""
    # quotient = mantissa * 2^exponent with 1/2 <= mantissa < 1
    mantissa, exponent = torch.frexp(amax.double().clamp(min=floor) / limit)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., K] -> fp32 [..., ceil(K / size), size], padded with zeros."""
    return torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def fp8_round(x: torch.Tensor, block: int) -> torch.Tensor:
    """Quantize to e4m3 with one power-of-two scale per `block` values of the last axis, and back to fp32."""
    blocks = _blocks(x, block)
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True), 1e-4, E4M3_MAX)
    return (e4m3(blocks / scale).float() * scale).flatten(-2)[..., : x.shape[-1]]


def fp4_round(x: torch.Tensor, block: int = 32) -> torch.Tensor:
    """Quantize to e2m1 with one power-of-two scale per `block` values of the last axis, and back to fp32."""
    blocks = _blocks(x, block)
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True), E2M1_MAX * 2.0**-126, E2M1_MAX)
    return (e2m1_values(e2m1_codes(blocks / scale)) * scale).flatten(-2)[..., : x.shape[-1]]


def hadamard(n: int) -> torch.Tensor:
    """The Sylvester-ordered Hadamard matrix [n, n] of +-1; n is a power of two."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"the Hadamard transform needs a power of two, got {n} points")
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def nvfp4_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NVFP4 of one tensor: value = e2m1 * e4m3 block scale * fp32 global scale. K must be a multiple of 16.

    Returns (codes uint8 [..., K] one per byte, block scales float8_e4m3fn [..., K/16], global scale fp32 []).
    A block whose scale underflows e4m3 has scale zero and codes zero.
    """
    if x.shape[-1] % 16:
        raise ValueError(f"NVFP4 blocks hold 16 values; the last axis has {x.shape[-1]}")
    blocks = _blocks(x, 16)
    global_scale = blocks.abs().max() / (E2M1_MAX * E4M3_MAX)
    block_max = blocks.abs().amax(-1, keepdim=True)
    scales = e4m3(torch.where(block_max > 0, block_max / (E2M1_MAX * global_scale), 0.0))
    step = scales.float() * global_scale
    codes = torch.where(step > 0, e2m1_codes(blocks / step), 0).to(torch.uint8)
    return codes.flatten(-2), scales.squeeze(-1), global_scale


def nvfp4_values(codes: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """What `nvfp4_quantize` stored, fp32 [..., K]."""
    return e2m1_values(codes) * scales.float().repeat_interleave(16, -1) * global_scale
