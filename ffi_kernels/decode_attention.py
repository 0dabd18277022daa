"""Sparse attention of a decode step, from rotated queries to the rotated-back output: contract, checks, native launch.

Formulas: `fused_reference_attention.py`; kernel: `native/cuda/attention.cu`. Not here: attention of prompt chunks
(`attention.py`), the choice of entries (`attention.top_entries`).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffi_kernels.dispatch import current, implementation
from ffi_kernels.launch import launch, native
from ffi_kernels.tensor import KV_BLOCK, FP8KVCache

# Constants of native/include/attention.cuh: entries that a CTA holds at a time, pitch of scores, channels of a warp.
_TILE, _PITCH, _SLICE = 80, 88, 64
_MAX_CHANNELS = 512
# Clusters that share the keys of a token at most, and keys of one that fit in a tile each. 7 for each half of 64 heads run at once.
_CLUSTERS, _CLUSTER_KEYS = 7, 8 * _TILE  # kMaxClusters of attention_join.cuh
_TEAM_CHANNELS = 256  # from which on half of a CTA has a thread for each entry
# CTAs that run at once on an H200, by the size of a cluster: one per SM, but its GPCs do not all divide by 4 and more. Measured for
# 8, guessed for 4 from GPCs that fit it.
_CTAS = {1: 132, 2: 132, 4: 116, 8: 112}
_CHAIN = 4  # kMaxChain: parts of a token that are added up one after the other
# Times, measured on an H200 and relative. Of a CTA that takes one part and serves 16 heads, 32 heads, and each 32 heads more from entries
# it has decoded; that takes four parts and serves 16 heads; that takes one part and serves 64 heads, each further part of a chain, and
# each further part or chain that it leaves by itself. Of a second launch, and of each image that it adds up.
_COSTS = {16: 18, 32: 26, "more": 20, "four parts": 45, 64: 16, "link": 7.4, "turn": 11, "join": 6, "image": 0.1}
# Of sm90a/attention_64.cu: bytes of shared memory (kUsed); numbers of the image that a CTA leaves (kImage of attention_join.cuh).
_WIDE, _IMAGE = 231152, 64 * _MAX_CHANNELS


def decode_attention(
    q, window, fresh, compressed, picked, sink, start, length, cos, sin, *, ratio: int, return_lse: bool = False
):  # fmt: skip
    """Attention of the T new tokens of each sequence, written for T = 1..4. Key = value; one head of it.

    q: [B, T, H, K], normed and rotated. sink: fp32 [H], joins the denominator only. start, length: int32 [B]; token t
    stands at position p = start + t and counts if t < length, else its output is zero. cos, sin: fp32 [B, T, R/2] of
    the positions. Entries are FP8KVCache or plain [B, n, K] in q.dtype, all three in one format:
      window [B, W]: ring, position p in slot p % W, before this call; fresh [B, T]: the entries of the new tokens;
      a token sees the positions (p - W, p], those from start on in `fresh`;
      compressed [B, C] or None: of each token the entries picked, int32 [B, T, X] (-1 and any other index outside [0, C) is
      none; one picked twice counts twice), or with picked None all closed ones, j < (p + 1) // ratio.
    Scores q.k * K**-0.5 and exponentials in fp32, these rounded to q.dtype for the product with V (natively relative to
    the largest score so far of a part of the keys), accumulated and divided in fp32, rounded; then the last R channels are
    turned by (cos, -sin) and rounded again.
    Returns [B, T, H, K] in q.dtype; with return_lse also fp32 [B, T, H], the log of the sum of exponentials without the
    sink (-inf where nothing is seen). Native results of a token do not depend on B, T or other sequences, bit for bit.
    ValueError for shapes that do not fit; natively also unless q is bf16 and K a multiple of 128 up to 512.
    """
    _check(q, window, fresh, compressed, picked, sink, start, length, cos, sin, ratio)
    return implementation("decode_attention")(
        q, window, fresh, compressed, picked, sink, start, length, cos, sin, ratio=ratio, return_lse=return_lse
    )


def _check(q, window, fresh, compressed, picked, sink, start, length, cos, sin, ratio: int) -> None:
    batch, tokens, heads, channels = q.shape
    rope = 2 * cos.shape[-1]
    wanted = {
        "sink": (heads,), "start": (batch,), "length": (batch,), "cos": (batch, tokens, rope // 2), "sin": (batch, tokens, rope // 2)
    }  # fmt: skip
    got = {"sink": sink.shape, "start": start.shape, "length": length.shape, "cos": cos.shape, "sin": sin.shape}
    caches = {"window": window, "fresh": fresh, "compressed": compressed}
    fp8 = isinstance(window, FP8KVCache)
    for name, cache in caches.items():
        if cache is None and name == "compressed":
            continue
        if isinstance(cache, FP8KVCache) != fp8:
            kinds = type(window).__name__, type(cache).__name__
            raise ValueError(f"decode_attention reads entries of one format, but window is {kinds[0]} and {name} {kinds[1]}.")
        for array, width in [(cache.data, channels + rope), (cache.scale, _scale_bytes(channels, rope))] if fp8 else [(cache, channels)]:
            count = tokens if name == "fresh" else array.shape[1] if array.ndim == 3 else 0
            wanted[f"{name}[{width}]"], got[f"{name}[{width}]"] = (batch, count, width), array.shape
    if picked is not None:
        wanted["picked"], got["picked"] = (batch, tokens, picked.shape[-1]), picked.shape
    if wrong := [f"{name} {got[name]} (wanted {shape})" for name, shape in wanted.items() if got[name] != shape]:
        raise ValueError(f"decode_attention with q {q.shape} got {', '.join(wrong)}.")
    if rope > channels or (fp8 and (channels - rope) % KV_BLOCK):
        raise ValueError(
            f"decode_attention got {channels} channels of which {rope} rotate; FP8 entries need the rest in blocks of {KV_BLOCK}."
        )
    if (compressed is None) != (ratio == 0) or (picked is not None and compressed is None):
        state = "missing" if compressed is None else "given"
        raise ValueError(f"decode_attention got ratio {ratio} with compressed {state}; ratio 0 means none.")


def _scale_bytes(channels: int, rope: int) -> int:
    blocks = (channels - rope) // KV_BLOCK
    return blocks + -blocks % 8


def parts_of(keys: int) -> tuple[int, int]:
    """How the keys of one token are divided: clusters of CTAs, and parts of each. By the capacity of a sequence, never by the batch."""
    parts = min(8, 1 << max(0, math.ceil(keys / _TILE) - 1).bit_length())
    return min(_CLUSTERS, max(1, math.ceil(keys / _CLUSTER_KEYS))), parts


def _inverse(divisor: int) -> int:
    """2**32 / divisor, rounded up, in the bits of an int32; of no use for 1."""
    return int(np.uint32(-(-(2**32) // divisor) % 2**32).view(np.int32))


class Mapping(NamedTuple):
    """What a CTA does of the work on one token. No bit of the result depends on it."""

    heads: int  # that it serves at a time
    passes: int  # how often, with the entries that it has decoded
    parts: int  # 1; with 16 heads also 4, of which two teams of its warps take two each; with 64 also a chain
    turns: int = 1  # with 64 heads: how many such parts or chains it takes one after the other


def mapping_of(rows: int, heads: int, channels: int, clusters: int, parts: int, fits: bool, wide: bool) -> Mapping:
    """What needs the least time: waves of clusters, or for 64 heads of CTAs, that `rows` tokens share, and what joins them.

    fits: all entries of a part fit into shared memory at once, where they can wait for more heads. wide: 64 heads at a time are possible.
    """
    groups, options = -(-heads // 32), {Mapping(16, 1, 1): _COSTS[16]}
    if heads > 16:
        options[Mapping(32, 1, 1)] = _COSTS[32]
    if wide and heads > 32:
        for chain in {1, min(_CHAIN, parts)} if fits else {1}:
            for turns in (t for t in (1, 2, 4, 8) if t * chain <= parts):
                options[Mapping(64, 1, chain, turns)] = _COSTS[64] + turns * (chain - 1) * _COSTS["link"] + (turns - 1) * _COSTS["turn"]
    if fits and groups > 1:
        options[Mapping(32, groups, 1)] = _COSTS[32] + _COSTS["more"] * (groups - 1)
    if fits and parts >= 4 and channels >= _TEAM_CHANNELS:
        options[Mapping(16, 1, 4)] = _COSTS["four parts"]

    def time(mapping):
        groups, left = -(-heads // (mapping.heads * mapping.passes)), parts // mapping.parts  # left: parts or chains
        size = 1 if mapping.heads == 64 else left  # of a cluster
        waves = -(-rows * clusters * groups * left // mapping.turns // _CTAS[size])
        images = rows * clusters * groups * left if mapping.heads == 64 else 0
        return options[mapping] * waves + (_COSTS["join"] if images or clusters > 1 else 0) + _COSTS["image"] * images

    return min(options, key=time)


@native("decode_attention")
def _decode_attention(q, window, fresh, compressed, picked, sink, start, length, cos, sin, *, ratio: int, return_lse: bool):
    batch, tokens, heads, channels = q.shape
    rope, fp8 = 2 * cos.shape[-1], isinstance(window, FP8KVCache)
    if q.dtype != jnp.bfloat16 or channels % 128 or not 128 <= channels <= _MAX_CHANNELS or (fp8 and rope % _SLICE):
        raise ValueError(
            f"decode_attention on {current()} takes bf16 queries of 128, 256, 384 or {_MAX_CHANNELS} channels (FP8 entries: {_SLICE} "
            f"rotated channels or a multiple), got {q.dtype} [..., {channels}] with {rope} rotated; use backend('xla')."
        )
    if ratio & (ratio - 1) and picked is None:
        raise ValueError(
            f"decode_attention on {current()} finds closed entries for ratios that are powers of two, got {ratio}; use backend('xla')."
        )
    if not fp8 and any(e is not None and e.dtype != jnp.bfloat16 for e in (window, fresh, compressed)):
        raise ValueError(f"decode_attention on {current()} reads plain entries in bf16, got {window.dtype}; use backend('xla').")

    def arrays(cache):
        return [cache.data, cache.scale] if isinstance(cache, FP8KVCache) else [cache, None]

    size, entries = jax.tree.leaves(window)[0].shape[1], 0 if compressed is None else jax.tree.leaves(compressed)[0].shape[1]
    picks = 0 if picked is None else picked.shape[-1]
    visible = entries if picked is None else picks
    clusters, parts = parts_of(size + visible)
    shares = [-(-count // (clusters * parts)) for count in (size, picks, visible)]
    fits = shares[0] + shares[2] <= _TILE
    wide = fp8 and current() != "sm_100a" and (channels, rope) == (_MAX_CHANNELS, _SLICE)
    group, passes, parts_of_turn, turns = mapping_of(batch * tokens, heads, channels, clusters, parts, fits, wide)
    images = group == 64  # that its CTAs leave: each for itself, without clusters
    slots, stages, teams = parts // parts_of_turn, 1 if fits else 2, 2 if parts_of_turn == 4 and not images else 1
    cluster = 1 if images else slots
    stage_bytes = channels // _SLICE * _TILE * 2 * _SLICE
    sizes = {
        "entries": stages * stage_bytes, "output": group * channels * 4 if passes > 1 else 0, "rows": 2 * _TILE * 16,
        "scores": channels // 128 * group * _PITCH * 4, "weights": group * _PITCH * 2,
        "factor": group * 4, "largest": teams * group * 4, "total": teams * group * 4,  # a team takes two parts
    }  # fmt: skip
    module, kernel, threads = "attention", "teams" if teams > 1 else group, channels
    if images:
        sizes = dict.fromkeys(sizes, 0)
        module, kernel, threads = "attention_64", "64_chain" if parts_of_turn > 1 else "64", 512
    *offsets, used = itertools.accumulate(sizes.values())
    if passes == 1:
        offsets[0] = 0  # the output takes the place of the entries
    team_bytes = -(-used // 256) * 256
    angles = teams * team_bytes
    sinks = angles + rope * 4
    finished = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32) if return_lse else None]
    groups = -(-heads // (group * passes))
    of_row = (clusters, slots, groups) if images else (clusters, heads)
    sizes_left = (_IMAGE, group * 2) if images else (channels, 2)
    partial = [jax.ShapeDtypeStruct((batch, tokens, *of_row, size), jnp.float32) for size in sizes_left]
    joins = images or clusters > 1
    out, lse, *left = launch(
        "decode_attention", module, f"decode_attention_{'fp8' if fp8 else 'bf16'}_{kernel}",
        grid=(clusters * slots // turns, groups, batch * tokens), block=threads, cluster=(cluster, 1, 1),
        shared_bytes=_WIDE if images else sinks + group * passes * 4,
        inputs=[q, *arrays(window), *arrays(fresh), *arrays(compressed), picked, sink, start, length, cos, sin],
        outputs=[None, None, *partial] if joins else [*finished, None, None],
        scalars=[
            tokens, heads, channels, rope, size, entries, picks, max(ratio, 1).bit_length() - 1, clusters * parts,
            _inverse(tokens), _inverse(clusters * parts), cluster.bit_length() - 1,
            *shares[:2], channels + rope if fp8 else 2 * channels,
            _scale_bytes(channels, rope) if fp8 else 0, stages, stage_bytes, team_bytes, passes, turns, parts_of_turn, *offsets, angles, sinks,
            channels**-0.5 / math.log(2),
        ],
    )  # fmt: skip
    if joins:
        kernel = "decode_attention_join" + ("_64" if images else "") + ("_clusters" if images and clusters > 1 else "")
        out, lse = launch(
            "decode_attention", module, kernel, grid=(heads, tokens, batch), block=channels // 4,
            inputs=[*left, sink, length, cos, sin], outputs=finished,
            scalars=[heads, channels, rope, clusters, *([slots, parts_of_turn] if images else [])],
        )  # fmt: skip
    return (out, lse) if return_lse else out
