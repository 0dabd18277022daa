"""Packing a model for an arch: on one device and shard by shard, back bit for bit, and refused where it cannot run."""

import dataclasses

import jax
import numpy as np
import pytest

import dsv4_jax as dsv4
import ffi_kernels as ops
from dsv4_jax import pack, params
from ffi_kernels import layout
from models import small_model, tokens


def split(model, mesh, expert_sharding):
    out = dataclasses.replace(model, mesh=mesh, expert_sharding=expert_sharding)
    return dataclasses.replace(out, weights=jax.device_put(model.weights, params.shardings(out.context)))


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize("arch", ["xla", "sim", "sm_90a"])
def test_linear_archs_keep_the_model(arch):
    model = small_model("nvfp4")
    assert pack.pack_for(model, arch) is model and pack.unpack(model) is model and pack.layouts(model) == {"linear"}


def test_packed_for_sm_100a_and_back():
    model = small_model("nvfp4")
    packed = pack.pack_for(model, "sm_100a")
    assert pack.layouts(packed) == {"linear", "tcgen05", "tcgen05_gate_up"}  # norms and the like are linear
    experts, before = packed.weights["mtp"]["ffn"]["experts"], model.weights["mtp"]["ffn"]["experts"]
    assert experts["w3"] is None
    assert_same_bits(experts["w1"], layout.pack_gate_up(before["w1"], before["w3"]))
    assert_same_bits(packed.weights["layers"][1]["attn"]["wo_a"], layout.pack_tcgen05(model.weights["layers"][1]["attn"]["wo_a"]))
    left = [w for w in jax.tree.leaves(packed.weights, is_leaf=lambda w: isinstance(w, ops.QUANTIZED)) if getattr(w, "layout", "") == "linear"]
    assert not left, "every NVFP4 weight is packed"
    back = pack.unpack(packed)
    assert_same_bits(back.weights, model.weights)
    row = tokens(5)
    assert np.array_equal(dsv4.forward(back, row), dsv4.forward(model, row))


def test_other_formats_stay_linear():
    model = small_model("official")
    assert pack.layouts(pack.pack_for(model, "sm_100a")) == {"linear"}
    mixed = dataclasses.replace(model, weights=dict(small_model("nvfp4").weights, mtp=model.weights["mtp"]))
    packed = pack.pack_for(mixed, "sm_100a")
    assert_same_bits(packed.weights["mtp"], model.weights["mtp"])
    assert_same_bits(pack.unpack(packed).weights, mixed.weights)


@pytest.mark.parametrize("data, tensor, experts", [(1, 8, "width"), (2, 4, "experts"), (1, 2, "experts")])
def test_a_device_packs_its_own_shard(data, tensor, experts):
    """Every shard of a packed weight is the packing of the linear weight's shard, tiles padded per shard."""
    model = split(small_model("nvfp4"), dsv4.make_mesh(data, tensor), experts)
    packed = pack.pack_for(model, "sm_100a")

    def shards(tree, device):
        return jax.tree.map(lambda x: next(s.data for s in x.addressable_shards if s.device == device), tree)

    for device in (jax.devices()[0], model.mesh.devices[-1, -1]):
        linear, local = shards(model.weights["layers"][1], device), shards(packed.weights["layers"][1], device)
        assert_same_bits(local["ffn"]["experts"]["w1"], layout.pack_gate_up(linear["ffn"]["experts"]["w1"], linear["ffn"]["experts"]["w3"]))
        for part, name in [("attn", "wq_b"), ("attn", "wo_b"), ("attn", "wo_a"), ("attn", "wq_a")]:
            assert_same_bits(local[part][name], layout.pack_tcgen05(linear[part][name]))
        assert_same_bits(local["ffn"]["shared_experts"]["w2"], layout.pack_tcgen05(linear["ffn"]["shared_experts"]["w2"]))
    back = pack.unpack(packed)
    assert_same_bits(back.weights, model.weights)
    for leaf, sharding in zip(jax.tree.leaves(back.weights), jax.tree.leaves(params.shardings(model.context)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("tensor", [None, 2])
def test_xla_refuses_a_packed_model(tensor):
    model = small_model("nvfp4")
    model = model if tensor is None else split(model, dsv4.make_mesh(1, tensor), "width")
    packed = pack.pack_for(model, "sm_100a")
    with pytest.raises(ValueError, match=r"linears? got a NVFP4Tensor in layout 'tcgen05', but takes 'linear' on this backend; unpack"):
        dsv4.forward(packed, tokens(4))


def test_sentences():
    model = small_model("nvfp4")
    with pytest.raises(ValueError, match="arch 'sm_120' is not known; choose one of xla, sim, sm_90a, sm_100a"):
        pack.pack_for(model, "sm_120")
    packed = pack.pack_for(model, "sm_100a")
    for arch in pack.ARCHS:
        with pytest.raises(ValueError, match=r"packed already \(layouts tcgen05, tcgen05_gate_up\); unpack it first"):
            pack.pack_for(packed, arch)
