"""Layouts of NVFP4 weights other than linear, and the exact way back. One tensor, one shard; pure jnp.

What tcgen05 kernels read without shuffling:
  'tcgen05'          block scales in 512-byte tiles of 128 rows x 4 k-blocks, uint8 [..., ceil(N/128), ceil(K/64), 512];
                     row r, k-block c of a tile at (r % 32) * 16 + (r // 32) * 4 + c; the padding is zero. data and
                     global_scale are as in the linear layout.
  'tcgen05_gate_up'  w1 and w3 of a SwiGLU in one tensor of 2F rows, 8 of w1 and 8 of w3 in turn, so that one
                     accumulator tile holds gate and up of the same channels; scales tiled as above;
                     global_scale [..., 2], w1's and w3's.
The numbers of rows and blocks are those of `data`, so nothing else is needed to unpack. A layout belongs to a shard:
pack what one device holds. Not here: which weights of a model are packed (`dsv4_jax/pack.py`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ffi_kernels.tensor import NVFP4_BLOCK, NVFP4Tensor, require_layout

TCGEN05, TCGEN05_GATE_UP = "tcgen05", "tcgen05_gate_up"
TILE_ROWS, TILE_BLOCKS = 128, 4
INTERLEAVED_ROWS = 8


def tile_scales(scale: jax.Array) -> jax.Array:
    """Block scales, one byte each, [..., N, C] -> uint8 tiles [..., ceil(N/128), ceil(C/4), 512], zero padded."""
    scale = jax.lax.bitcast_convert_type(scale, jnp.uint8)
    *leading, rows, blocks = scale.shape
    pad = [(0, 0)] * len(leading) + [(0, -rows % TILE_ROWS), (0, -blocks % TILE_BLOCKS)]
    tiles = jnp.pad(scale, pad).reshape(*leading, -(-rows // TILE_ROWS), 4, 32, -(-blocks // TILE_BLOCKS), TILE_BLOCKS)
    n = len(leading)  # axes: row tile, r // 32, r % 32, column tile, c
    return tiles.transpose(*range(n), n, n + 3, n + 2, n + 1, n + 4).reshape(*leading, tiles.shape[n], tiles.shape[n + 3], 512)


def untile_scales(tiles: jax.Array, rows: int, blocks: int) -> jax.Array:
    """The inverse of `tile_scales`: uint8 tiles -> float8_e4m3fn [..., rows, blocks]."""
    *leading, down, across, _ = tiles.shape
    n = len(leading)
    split = tiles.reshape(*leading, down, across, 32, 4, TILE_BLOCKS)
    scale = split.transpose(*range(n), n, n + 3, n + 2, n + 1, n + 4).reshape(*leading, down * TILE_ROWS, -1)
    return jax.lax.bitcast_convert_type(scale[..., :rows, :blocks], jnp.float8_e4m3fn)


def _interleave(a: jax.Array, b: jax.Array) -> jax.Array:
    """Two [..., F, C] -> [..., 2F, C]: 8 rows of a, 8 of b, and so on."""
    groups = [x.reshape(*x.shape[:-2], -1, 1, INTERLEAVED_ROWS, x.shape[-1]) for x in (a, b)]
    return jnp.concatenate(groups, axis=-3).reshape(*a.shape[:-2], -1, a.shape[-1])


def _deinterleave(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    groups = x.reshape(*x.shape[:-2], -1, 2, INTERLEAVED_ROWS, x.shape[-1])
    a, b = (groups[..., i, :, :].reshape(*x.shape[:-2], -1, x.shape[-1]) for i in (0, 1))
    return a, b


def pack_tcgen05(w: NVFP4Tensor) -> NVFP4Tensor:
    """A linear weight [..., N, K] with its scales in tcgen05 tiles."""
    require_layout("pack_tcgen05", w)
    return NVFP4Tensor(w.data, tile_scales(w.scale), w.global_scale, TCGEN05)


def unpack_tcgen05(w: NVFP4Tensor) -> NVFP4Tensor:
    """The inverse of `pack_tcgen05`, bit for bit."""
    require_layout("unpack_tcgen05", w, accepted=(TCGEN05,))
    rows, k = w.shape[-2:]
    return NVFP4Tensor(w.data, untile_scales(w.scale, rows, k // NVFP4_BLOCK), w.global_scale)


def pack_gate_up(w1: NVFP4Tensor, w3: NVFP4Tensor) -> NVFP4Tensor:
    """Linear gate and up weights [..., F, K], F a multiple of 8 -> one tensor [..., 2F, K]."""
    require_layout("pack_gate_up", w1, w3)
    if w1.shape != w3.shape or w1.shape[-2] % INTERLEAVED_ROWS:
        raise ValueError(
            f"pack_gate_up interleaves w1 {w1.shape} and w3 {w3.shape} by {INTERLEAVED_ROWS} rows: they must have one shape "
            f"and a multiple of {INTERLEAVED_ROWS} rows on each device; use a smaller mesh."
        )
    return NVFP4Tensor(
        _interleave(w1.data, w3.data), tile_scales(_interleave(w1.scale, w3.scale)),
        jnp.stack([w1.global_scale, w3.global_scale], axis=-1), TCGEN05_GATE_UP,
    )  # fmt: skip


def unpack_gate_up(w: NVFP4Tensor) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """The inverse of `pack_gate_up`, bit for bit: (w1, w3)."""
    require_layout("unpack_gate_up", w, accepted=(TCGEN05_GATE_UP,))
    rows, k = w.shape[-2:]
    scales = _deinterleave(untile_scales(w.scale, rows, k // NVFP4_BLOCK))
    parts = zip(_deinterleave(w.data), scales, (w.global_scale[..., 0], w.global_scale[..., 1]), strict=True)
    gate, up = (NVFP4Tensor(*part) for part in parts)
    return gate, up
