"""Every op in plain jnp: what it means, and the `xla` backend.

Shape letters: B batch, T tokens, D model, H heads, K head_dim, R rope, E experts, F expert width, M streams,
C compressed entries, X top-k, N rows of a weight. "..." are any leading axes. Checks of shapes and the choice of a
backend are in the op families beside this file; rounding is in `numerics.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ffi_kernels import numerics
from ffi_kernels.tensor import (
    FP8_BLOCK, KV_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, FP8Activation, FP8KVCache, FP8Tensor, MXFP4Tensor, NVFP4Tensor,
    Unquantized,
)  # fmt: skip

# --- quantize, dequantize (facts section 3) ---------------------------------------------------------------------


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """fp32 [..., K] -> [..., ceil(K/size), size], zero padded."""
    pad = -x.shape[-1] % size
    x = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, pad)])
    return x.reshape(*x.shape[:-1], -1, size)


def _fp8_exponent(amax: jax.Array) -> jax.Array:
    return jnp.clip(numerics.ceil_log2(jnp.maximum(amax, 1e-4), 1.75) - 8, -127, 127)  # 448 = 1.75 * 2**8


def _fp4_exponent(amax: jax.Array) -> jax.Array:
    return jnp.clip(numerics.ceil_log2(jnp.maximum(amax, 6 * 2.0**-126), 1.5) - 2, -127, 127)  # 6 = 1.5 * 2**2


def _e4m3(x: jax.Array) -> jax.Array:
    return numerics.round_e4m3(x).astype(jnp.float8_e4m3fn)


def quantize_fp8(x: jax.Array) -> FP8Activation:
    """Activation [..., K]: scale 2**ceil(log2(max(amax, 1e-4) / 448)) per 1 x 128."""
    blocks = _blocks(x, FP8_BLOCK)
    exponent = _fp8_exponent(jnp.abs(blocks).max(-1))
    data = _e4m3(numerics.scale_by_power_of_two(blocks, -exponent[..., None]))
    data = data.reshape(*data.shape[:-2], -1)[..., : x.shape[-1]]
    return FP8Activation(data, numerics.encode_e8m0(exponent))


def quantize_fp8_weight(w: jax.Array) -> FP8Tensor:
    """Weight [..., N, K]: the same scale per 128 x 128."""
    n, k = w.shape[-2:]
    rows = _blocks(jnp.swapaxes(_blocks(w, FP8_BLOCK).reshape(*w.shape[:-1], -1), -1, -2), FP8_BLOCK)
    tiles = rows.reshape(*w.shape[:-2], -1, FP8_BLOCK, rows.shape[-2], FP8_BLOCK)  # [..., K/128, 128, N/128, 128]
    exponent = _fp8_exponent(jnp.abs(tiles).max((-3, -1)))
    data = _e4m3(numerics.scale_by_power_of_two(tiles, -exponent[..., :, None, :, None]))
    data = jnp.swapaxes(data.reshape(*w.shape[:-2], rows.shape[-3], -1), -1, -2)[..., :n, :k]
    return FP8Tensor(data, numerics.encode_e8m0(jnp.swapaxes(exponent, -1, -2)))


def quantize_mxfp4(x: jax.Array) -> MXFP4Tensor:
    """[..., K]: scale 2**ceil(log2(max(amax, 6 * 2**-126) / 6)) per 32 along K."""
    blocks = _blocks(x, MXFP4_BLOCK)
    exponent = _fp4_exponent(jnp.abs(blocks).max(-1))
    codes = numerics.encode_e2m1(numerics.scale_by_power_of_two(blocks, -exponent[..., None]))
    return MXFP4Tensor(numerics.pack_e2m1(codes.reshape(x.shape)), numerics.encode_e8m0(exponent))


def nvfp4_global_scale(amax: jax.Array) -> jax.Array:
    """amax / (6 * 448), or 1 where that underflows; fp32."""
    scale = numerics.divide(amax.astype(jnp.float32), jnp.where(amax == amax, 2688.0, jnp.nan))
    return jnp.where(scale < 2.0**-126, 1.0, scale)


def quantize_nvfp4(x: jax.Array, global_scale: jax.Array) -> NVFP4Tensor:
    """[..., K] with a global scale that broadcasts against x: s = e4m3(blockmax / (6 global)), q = e2m1(x / (s global))."""
    blocks = _blocks(x, NVFP4_BLOCK)
    wide = global_scale.astype(jnp.float32)
    scale = numerics.round_e4m3(numerics.divide(jnp.abs(blocks).max(-1), jnp.broadcast_to(6 * wide, blocks.shape[:-1])))
    unit = (scale * wide)[..., None]
    usable = unit >= 2.0**-126
    ratio = numerics.divide(blocks, jnp.broadcast_to(jnp.where(usable | (unit != unit), unit, 1.0), blocks.shape))
    codes = jnp.where(usable | (unit != unit), numerics.encode_e2m1(ratio), 0)
    scale = jnp.where(usable[..., 0] | (scale != scale), scale, 0.0)
    return NVFP4Tensor(numerics.pack_e2m1(codes.reshape(x.shape)), scale.astype(jnp.float8_e4m3fn), wide)


def quantize_nvfp4_rows(x: jax.Array, amax: jax.Array | None = None) -> NVFP4Tensor:
    """An activation [..., K], one global scale per row; `amax` [..., 1] where K is only a shard of the row."""
    amax = jnp.abs(x).max(-1, keepdims=True) if amax is None else amax
    return quantize_nvfp4(x, nvfp4_global_scale(amax))


def quantize_nvfp4_weight(w: jax.Array) -> NVFP4Tensor:
    """A weight [..., N, K], one global scale per matrix."""
    scale = nvfp4_global_scale(jnp.abs(w).max((-2, -1)))
    out = quantize_nvfp4(w, scale[..., None, None])
    return NVFP4Tensor(out.data, out.scale, scale)


def mxfp4_to_nvfp4(w: MXFP4Tensor) -> tuple[NVFP4Tensor, jax.Array]:
    """Lossless: nibbles unchanged, block scale 2**(k - kmax + 8) twice, global 2**(kmax - 8), per matrix.

    Returns the tensor and the int32 count of blocks whose scale e4m3 cannot hold (kmax - k > 17); those become zero.
    """
    exponent = numerics.decode_e8m0(w.scale)
    base = jnp.maximum(exponent.max((-2, -1)) - 8, -126)  # what the global scale can hold without a subnormal
    relative = exponent - base[..., None, None]
    scale = jnp.where(relative >= -9, numerics.power_of_two(jnp.maximum(relative, -9)), 0.0)
    scale = jnp.repeat(scale, MXFP4_BLOCK // NVFP4_BLOCK, axis=-1).astype(jnp.float8_e4m3fn)
    used = (w.data != 0).reshape(*w.scale.shape, -1).any(-1)  # a block of zeros is exact under any scale
    inexact = ((relative < -9) & used).sum(dtype=jnp.int32)
    return NVFP4Tensor(w.data, scale, numerics.power_of_two(base)), inexact


def _block_values(t, dtype) -> jax.Array:
    """Values without the global scale of NVFP4: exact in bf16 for every format."""
    if isinstance(t, NVFP4Tensor):
        values = numerics.decode_e2m1(numerics.unpack_e2m1(t.data))
        return (values * jnp.repeat(t.scale.astype(jnp.float32), NVFP4_BLOCK, axis=-1)).astype(dtype)
    if isinstance(t, MXFP4Tensor):
        values = numerics.decode_e2m1(numerics.unpack_e2m1(t.data))
        exponent = jnp.repeat(numerics.decode_e8m0(t.scale), MXFP4_BLOCK, axis=-1)
    elif isinstance(t, FP8Tensor):
        values = t.data.astype(jnp.float32)
        exponent = jnp.repeat(numerics.decode_e8m0(t.scale), FP8_BLOCK, axis=-1)[..., : t.shape[-1]]
        exponent = jnp.repeat(exponent, FP8_BLOCK, axis=-2)[..., : t.shape[-2], :]
    elif isinstance(t, FP8Activation):
        values = t.data.astype(jnp.float32)
        exponent = jnp.repeat(numerics.decode_e8m0(t.scale), FP8_BLOCK, axis=-1)[..., : t.shape[-1]]
    else:
        return t.astype(dtype)
    return numerics.times_power_of_two(values, exponent).astype(dtype)  # e2m1 and e4m3 values are normal in fp32


def dequantize(t) -> jax.Array:
    """Any quantized array (or a plain one) -> fp32 of its logical shape."""
    values = _block_values(t, jnp.float32)
    if not isinstance(t, NVFP4Tensor):
        return values
    scale = t.global_scale
    return values * (scale if scale.ndim == values.ndim else scale[..., None, None])


def encode_kv(kv: jax.Array, rope_dim: int) -> FP8KVCache:
    """bf16 entries [..., K] -> the compact format: nope channels FP8 in blocks of 64, rope channels as they are."""
    nope = _blocks(kv[..., :-rope_dim], KV_BLOCK)
    exponent = _fp8_exponent(jnp.abs(nope).max(-1))
    data = _e4m3(numerics.scale_by_power_of_two(nope, -exponent[..., None])).reshape(*kv.shape[:-1], -1)
    rope = jax.lax.bitcast_convert_type(kv[..., -rope_dim:].astype(jnp.bfloat16), jnp.uint8)
    data = jnp.concatenate([jax.lax.bitcast_convert_type(data, jnp.uint8), rope.reshape(*kv.shape[:-1], -1)], axis=-1)
    pad = [(0, 0)] * (exponent.ndim - 1) + [(0, -exponent.shape[-1] % 8)]
    return FP8KVCache(data, jnp.pad(numerics.encode_e8m0(exponent), pad))


def decode_kv(cache: FP8KVCache, rope_dim: int) -> jax.Array:
    """The compact format -> bf16 [..., K]."""
    nope = jax.lax.bitcast_convert_type(cache.data[..., : -2 * rope_dim], jnp.float8_e4m3fn).astype(jnp.float32)
    blocks = nope.shape[-1] // KV_BLOCK
    exponent = jnp.repeat(numerics.decode_e8m0(cache.scale[..., :blocks]), KV_BLOCK, axis=-1)
    nope = numerics.times_power_of_two(nope, exponent).astype(jnp.bfloat16)
    rope = cache.data[..., -2 * rope_dim :].reshape(*cache.data.shape[:-1], rope_dim, 2)
    return jnp.concatenate([nope, jax.lax.bitcast_convert_type(rope, jnp.bfloat16)], axis=-1)


def kv_values(cache, rope_dim: int) -> jax.Array:
    """Entries of a cache in either format (FP8KVCache, or a plain array) as numbers."""
    return decode_kv(cache, rope_dim) if isinstance(cache, FP8KVCache) else cache


# --- linear -----------------------------------------------------------------------------------------------------


_GROUP, _FEW = 8, 64  # rows per product while there are at most so many


def _in_groups(product, x: jax.Array) -> jax.Array:
    """product(rows [8, ...]) -> [8, ...] over x [R, ...] in groups of 8 rows, zero padded; all rows at once when many.

    Libraries choose an order of summation by shape: a lone row gets another one than two, and 16 rows another than 24.
    In groups of one shape, a token's bits do not depend on how many tokens share a decode step.
    """
    rows = x.shape[0]
    if rows > _FEW:
        return product(x)
    x = jnp.pad(x, [(0, -rows % _GROUP)] + [(0, 0)] * (x.ndim - 1))
    groups = x.reshape(-1, _GROUP, *x.shape[1:])
    out = product(groups[0])[None] if groups.shape[0] == 1 else jax.lax.map(product, groups)
    return out.reshape(-1, *out.shape[2:])[:rows]


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., K], w [N, K] -> fp32 [..., N]."""
    return _in_groups(lambda rows: _dot_rows(rows, w), x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _dot_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    dimensions = (((x.ndim - 1,), (w.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, w, dimensions, jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _operands(x, w) -> tuple[jax.Array, jax.Array]:
    """Both sides in the narrowest dtype that holds them exactly: bf16, unless a plain side is fp32."""
    plain = [t.dtype for t in (x, w) if isinstance(t, jax.Array)]
    dtype = jnp.float32 if jnp.float32 in plain else jnp.bfloat16
    return _block_values(x, dtype), _block_values(w, dtype)


def _global_scales(x, w) -> list[jax.Array]:
    scales = [x.global_scale] if isinstance(x, NVFP4Tensor) else []
    return scales + ([w.global_scale] if isinstance(w, NVFP4Tensor) else [])


def as_taken(x, w):
    """An `Unquantized` input in the format that weight w takes; any other as it is."""
    if not isinstance(x, Unquantized):
        return x
    quantize = {NVFP4Tensor: quantize_nvfp4_rows, FP8Tensor: quantize_fp8, MXFP4Tensor: quantize_fp8}.get(type(w))
    return x.data if quantize is None else quantize(x.data)


def linear(x, w, dtype=jnp.float32) -> jax.Array:
    """x [..., K] (plain, FP8Activation, NVFP4Tensor or Unquantized) times w [N, K] transposed -> [..., N]."""
    x = as_taken(x, w)
    out = _dot(*_operands(x, w))
    for scale in _global_scales(x, w):
        out = out * scale
    return numerics.round_to(out, dtype)


def grouped_linear(x, w, dtype=jnp.float32) -> jax.Array:
    """x [..., G, K], w [G, N, K] -> [..., G, N]: every group has its own matrix (wo_a)."""
    x = as_taken(x, w)
    a, b = _operands(x, w)

    def product(rows):
        return jnp.einsum("tgk,gnk->tgn", rows, b, precision="highest", preferred_element_type=jnp.float32)

    out = _in_groups(product, a.reshape(-1, *a.shape[-2:])).reshape(*a.shape[:-1], -1)
    if isinstance(x, NVFP4Tensor):
        out = out * x.global_scale
    return numerics.round_to(out * w.global_scale[:, None] if isinstance(w, NVFP4Tensor) else out, dtype)


# --- norm, rope -------------------------------------------------------------------------------------------------


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, in fp32, rounded once to x.dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return numerics.round_to(wide if weight is None else wide * weight.astype(jnp.float32), x.dtype)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the last R channels in interleaved pairs (2i, 2i+1), in fp32; cos, sin [..., R/2]. -sin inverts."""
    rope_dim = 2 * cos.shape[-1]
    tail = x[..., -rope_dim:].astype(jnp.float32)
    a, b = tail[..., 0::2], tail[..., 1::2]
    rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(tail.shape)
    return jnp.concatenate([x[..., :-rope_dim], numerics.round_to(rotated, x.dtype)], axis=-1)


def hadamard(x: jax.Array) -> jax.Array:
    """Walsh-Hadamard transform (Sylvester order) of the last axis, times its length**-0.5, rounded to x.dtype."""
    n = x.shape[-1]
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return numerics.round_to(_dot(x.astype(jnp.float32), jnp.asarray(matrix)) * n**-0.5, x.dtype)


# --- hyper-connections (facts section 2, mHC) -------------------------------------------------------------------


def _hc_mix(streams: jax.Array, fn: jax.Array, norm_eps: float) -> jax.Array:
    x = streams.astype(jnp.float32).reshape(*streams.shape[:-2], -1)
    return _dot(x, fn) * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + norm_eps)


def sinkhorn(logits: jax.Array, iterations: int, eps: float) -> jax.Array:
    """[..., M, M] -> nearly doubly stochastic: softmax over k, then columns, then (rows, columns) iterations - 1 times."""
    c = jax.nn.softmax(logits, axis=-1) + eps
    c = c / (c.sum(-2, keepdims=True) + eps)

    def body(_, c):
        c = c / (c.sum(-1, keepdims=True) + eps)
        return c / (c.sum(-2, keepdims=True) + eps)

    return jax.lax.fori_loop(0, iterations - 1, body, c)


def hc_pre(streams, fn, base, scale, *, iterations: int, eps: float, norm_eps: float):
    """streams [..., M, D] -> (sublayer input [..., D] in streams.dtype, post fp32 [..., M], comb fp32 [..., M, M])."""
    m = streams.shape[-2]
    mix = _hc_mix(streams, fn, norm_eps)
    pre = jax.nn.sigmoid(mix[..., :m] * scale[0] + base[:m]) + eps
    post = 2 * jax.nn.sigmoid(mix[..., m : 2 * m] * scale[1] + base[m : 2 * m])
    comb = (mix[..., 2 * m :] * scale[2] + base[2 * m :]).reshape(*mix.shape[:-1], m, m)
    y = numerics.round_to((pre[..., None] * streams.astype(jnp.float32)).sum(-2), streams.dtype)
    return y, post, sinkhorn(comb, iterations, eps)


def hc_post(streams: jax.Array, f: jax.Array, post: jax.Array, comb: jax.Array) -> jax.Array:
    """new X_k = post_k f + sum_j comb[j, k] X_j, rounded to streams.dtype."""
    wide = streams.astype(jnp.float32)
    mixed = (comb[..., :, :, None] * wide[..., :, None, :]).sum(-3)
    return numerics.round_to(post[..., None] * f.astype(jnp.float32)[..., None, :] + mixed, streams.dtype)


def hc_head(streams, fn, base, scale, *, eps: float, norm_eps: float) -> jax.Array:
    """streams [..., M, D] -> [..., D]: sum_j (sigmoid(m_j scale + base_j) + eps) X_j."""
    pre = jax.nn.sigmoid(_hc_mix(streams, fn, norm_eps) * scale + base) + eps
    return numerics.round_to((pre[..., None] * streams.astype(jnp.float32)).sum(-2), streams.dtype)


# --- compressor, indexer, attention -----------------------------------------------------------------------------


def compress_pool(kv: jax.Array, score: jax.Array) -> jax.Array:
    """kv, score fp32 [..., rows, w] -> [..., w]: per-channel softmax of the scores over the rows, weighted sum."""
    return (jax.nn.softmax(score, axis=-2) * kv).sum(-2)


def index_scores(q: jax.Array, keys, head_weights: jax.Array, visible=None, weight_scale: float = 1.0) -> jax.Array:
    """q [B, T, H, K], keys [B, C, K] (plain or MXFP4Tensor), head_weights fp32 or bf16 [B, T, H] -> fp32 [B, T, C].

    score = sum_h relu(q_h . k) * (w_h * weight_scale), here also of the entries that are not visible
    """
    dots = jnp.einsum("bthk,bck->bthc", q.astype(jnp.float32), _block_values(keys, jnp.float32), precision="highest")
    head_weights = head_weights.astype(jnp.float32) * weight_scale
    return jnp.einsum("bthc,bth->btc", jax.nn.relu(dots), head_weights, precision="highest")


def top_entries(scores: jax.Array, visible: jax.Array, count: int) -> jax.Array:
    """scores [B, T, C], visible int32 [B, T] -> int32 [B, T, min(count, C)]: the best of the first `visible` entries in
    ascending order, ties to the lower index, nan best of all, -1 where fewer are visible."""
    entries = scores.shape[-1]
    seen = jnp.arange(entries) < visible[..., None]
    scores = jnp.where(scores == 0, 0.0, scores)  # top_k ranks -0 below 0, which is no tie
    scores = jnp.where(scores == scores, scores, jnp.nan)  # and a nan with a sign below -inf
    picked = jax.lax.top_k(jnp.where(seen, scores, -jnp.inf), min(count, entries))[1]
    picked = jnp.sort(jnp.where(jnp.arange(picked.shape[-1]) < visible[..., None], picked, entries))
    return jnp.where(picked < entries, picked, -1)


def attention(q, keys, mask, sink, picked=None, picked_mask=None) -> jax.Array:
    """Softmax attention with a sink over shared and per-token entries; key = value.

    q [B, T, H, K]; keys [B, S, K] with mask bool [B, T, S]; picked [B, T, X, K] with picked_mask [B, T, X], entries
    of each token's own; sink fp32 [H] joins the denominator only. Scores q.k * K**-0.5 and their exponentials in fp32,
    rounded to q.dtype for the product with V, accumulated in fp32 and divided by the fp32 sum of the unrounded ones;
    result in q.dtype [B, T, H, K]. A token that sees nothing yields zeros.
    """
    scale = q.shape[-1] ** -0.5
    shared = jnp.einsum("bthk,bsk->bths", q, keys, precision="highest", preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask[:, :, None], shared, -jnp.inf)
    if picked is not None:
        own = jnp.einsum("bthk,btxk->bthx", q, picked, precision="highest", preferred_element_type=jnp.float32) * scale
        scores = jnp.concatenate([scores, jnp.where(picked_mask[:, :, None], own, -jnp.inf)], axis=-1)
    sink = jnp.broadcast_to(sink[:, None], (*scores.shape[:-1], 1))
    top = jnp.max(scores, -1, keepdims=True)  # without the sink: a sink of +-inf must not become inf - inf
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    p = jnp.exp(scores - top)
    total = p.sum(-1, keepdims=True) + jnp.exp(sink - top)
    p = numerics.round_to(p, q.dtype)
    out = jnp.einsum(
        "bths,bsk->bthk", p[..., : keys.shape[1]], keys, precision="highest", preferred_element_type=jnp.float32
    )
    if picked is not None:
        own = p[..., keys.shape[1] :]
        out += jnp.einsum("bthx,btxk->bthk", own, picked, precision="highest", preferred_element_type=jnp.float32)
    return numerics.round_to(out / jnp.where(total == 0, 1.0, total), q.dtype)


# --- mixture of experts -----------------------------------------------------------------------------------------


def router_scores(x: jax.Array, gate: jax.Array) -> jax.Array:
    """sqrt(softplus(x gate^T)) in fp32; x [T, D], gate [E, D] -> [T, E]."""
    return jnp.sqrt(jax.nn.softplus(_dot(x.astype(jnp.float32), gate.astype(jnp.float32))))


def route(scores: jax.Array, bias: jax.Array | None, fixed: jax.Array | None, count: int, scale: float):
    """Pick experts: `fixed` int32 [T, X] (hash routing), else the top `count` of scores + bias.

    Returns ids int32 [T, X] and weights fp32 [T, X] = scores[ids] / sum * scale; the bias never enters a weight.
    """
    ids = jax.lax.top_k(scores + bias, count)[1] if fixed is None else fixed
    picked = jnp.take_along_axis(scores, ids, axis=-1)
    return ids.astype(jnp.int32), picked / picked.sum(-1, keepdims=True) * scale


def swiglu(gate: jax.Array, up: jax.Array, weight: jax.Array | None, limit: float, dtype) -> jax.Array:
    """silu(min(gate, limit)) * clamp(up, +-limit) * weight; inputs rounded to dtype, computed in fp32, rounded."""
    gate = jnp.minimum(numerics.round_to(gate, dtype).astype(jnp.float32), limit)
    up = jnp.clip(numerics.round_to(up, dtype).astype(jnp.float32), -limit, limit)
    h = jax.nn.silu(gate) * up
    return numerics.round_to(h if weight is None else h * weight, dtype)
