"""Single values that must stop a conversion, and the formats of scales that occur in the wild."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="synthetic publications are written by torch")

from published import Maker, config_of, write  # noqa: E402

import checkpoints  # noqa: E402
import ffi_kernels as ops  # noqa: E402
from dsv4_jax import params  # noqa: E402

EXACT = {"official": "official", "modelopt": "lossless", "compressed-tensors": "fp32"}
WQ_B, EXPERT = "layers.1.attn.wq_b", "layers.1.ffn.experts.2.w1"


def with_byte(tensor, value, at=1):
    tensor.view(torch.uint8).reshape(-1)[at] = value


def convert(tmp_path, kind, change, recipe, **options):
    made = Maker(config_of(kind), kind).make()
    change(made.tensors)
    return checkpoints.convert(write(tmp_path / "source", made), tmp_path / "out", recipe, **options), made


def leaf(done, path):
    found = {}
    model = checkpoints.load(done.destination, recipe=None)
    params.map_params(lambda name, _, value: found.__setitem__(name, value), model.config, model.weights)
    return found[path]


def nan_plain(tensors):
    tensors["embed.weight"][3, 5] = float("nan")


BAD = {
    f"{WQ_B}.scale holds 1 scales that are not a number": ("official", lambda t: with_byte(t[f"{WQ_B}.scale"], 255)),
    f"{EXPERT}.scale holds 1 scales that are not a number": ("official", lambda t: with_byte(t[f"{EXPERT}.scale"], 255)),
    f"{WQ_B}.weight holds 1 weights that are not a number": ("official", lambda t: with_byte(t[f"{WQ_B}.weight"], 0xFF)),
    "embed.weight holds 1 values that are not a number": ("official", nan_plain),
    "layers.0.ffn.gate.tid2eid holds 1 expert ids outside [0, 3)": ("official", lambda t: t["layers.0.ffn.gate.tid2eid"][4].fill_(0)[0].fill_(3)),
    f"{EXPERT}.weight_scale holds 1 block scales that are negative": ("modelopt", lambda t: with_byte(t[f"{EXPERT}.weight_scale"], 0x80)),
    f"{EXPERT}.weight_scale holds 2 block scales": (
        "modelopt", lambda t: (with_byte(t[f"{EXPERT}.weight_scale"], 0x7F), with_byte(t[f"{EXPERT}.weight_scale"], 0xFF, 2))
    ),
    f"{EXPERT}.weight_scale_2 is nan": ("modelopt", lambda t: t[f"{EXPERT}.weight_scale_2"].fill_(float("nan"))),
    f"{EXPERT}.weight_scale_2 is -1.0": ("modelopt", lambda t: t[f"{EXPERT}.weight_scale_2"].fill_(-1)),
    f"{EXPERT}.weight_global_scale is 0.0": ("compressed-tensors", lambda t: t[f"{EXPERT}.weight_global_scale"].fill_(0)),
    f"{EXPERT}.weight_global_scale is inf": ("compressed-tensors", lambda t: t[f"{EXPERT}.weight_global_scale"].fill_(float("inf"))),
    f"{WQ_B}.weight_scale holds 1 scales that are not positive": ("compressed-tensors", lambda t: t[f"{WQ_B}.weight_scale"][0, 0].fill_(-2)),
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["exact", "nvfp4", "bf16"])
@pytest.mark.parametrize("sentence", BAD)
def test_values_that_no_checkpoint_should_hold(sentence, recipe, tmp_path):
    kind, change = BAD[sentence]
    with pytest.raises(ValueError, match="cannot be read") as error:
        convert(tmp_path, kind, change, EXACT[kind] if recipe == "exact" else recipe)
    assert sentence in str(error.value) and not (tmp_path / "out").exists()


def test_several_bad_values_are_listed_together(tmp_path):
    def change(tensors):
        for e in range(3):
            with_byte(tensors[f"layers.1.ffn.experts.{e}.w2.scale"], 255)
        nan_plain(tensors)

    with pytest.raises(ValueError) as error:
        convert(tmp_path, "official", change, "official")
    assert len(error.value.problems) == 4


@pytest.mark.parametrize("recipe", ["nvfp4", "bf16"])
def test_products_beyond_fp32_are_refused(recipe, tmp_path):
    wide = {"nvfp4": "fp32", "bf16": "bfloat16"}[recipe]
    with pytest.raises(ValueError, match=f"{WQ_B}.weight times its scales is beyond what {wide} can hold"):
        convert(tmp_path, "official", lambda t: t[f"{WQ_B}.scale"].view(torch.uint8).fill_(254), recipe)


def test_blocks_that_nvfp4_cannot_hold_are_an_error_until_allowed_and_then_counted(tmp_path):
    def change(tensors):
        scale = tensors[f"{EXPERT}.scale"].view(torch.uint8)
        scale.fill_(120)
        scale[0, :] = 120 - 18
        scale[5, 1] = 120 - 17  # the last that fits
        tensors[f"{EXPERT}.weight"].view(torch.uint8)[0, :16] = 0  # a block of zeros is exact under any scale

    with pytest.raises(ValueError, match=r"w1.weight has 2 blocks more than 2\*\*17 below its largest scale.*--allow-inexact"):
        convert(tmp_path / "a", "official", change, "nvfp4")
    done, _ = convert(tmp_path / "b", "official", change, "nvfp4", allow_inexact=True)
    assert done.reports["layers.1.ffn.experts.w1"].inexact == 2
    told = checkpoints.store.description(done.destination)["metadata"]["conversion"]["changed"]["layers.1.ffn.experts.w1"]
    exact, _ = convert(tmp_path / "c", "official", change, "official")
    ours, theirs = (np.asarray(jax.jit(ops.dequantize)(leaf(d, "layers.1.ffn.experts.w1"))) for d in (done, exact))
    assert (ours[2, 0] == 0).all() and (theirs[2, 0, 32:] != 0).any()
    assert (told["from"], told["to"], told["inexact"]) == ("mxfp4", "nvfp4", 2)
    assert told["largest_error"] == np.abs(ours - theirs).max() > 0  # of expert 2, the only one that changed
    np.testing.assert_allclose(told["relative_error"], np.linalg.norm(ours[2] - theirs[2]) / np.linalg.norm(theirs[2]), rtol=1e-6)
    np.testing.assert_array_equal(np.delete(ours, 0, axis=1), np.delete(theirs, 0, axis=1))


@pytest.mark.parametrize("shape", ["block", "row", "row vector", "one", "scalar"])
@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "scale"])
def test_fp32_scales_of_fp8_by_block_row_or_tensor(shape, suffix, tmp_path):
    """Powers of two that agree within a block become e8m0 without loss; anything else is refused, or dequantized."""
    rows = 256
    shapes = {"block": (2, 2), "row": (rows, 1), "row vector": (rows,), "one": (1,), "scalar": ()}

    def change(tensors, value):
        del tensors[f"{WQ_B}.scale"]
        tensors[f"{WQ_B}.{suffix}"] = torch.full(shapes[shape], value)

    done, made = convert(tmp_path / "a", "official", lambda t: change(t, 2.0**-7), "official")
    scale = np.asarray(leaf(done, WQ_B).scale)
    assert (scale == 120).all() and scale.shape == (2, 2)
    with pytest.raises(ValueError, match="wq_b.weight has scales that one power of two per 128 x 128 cannot hold"):
        convert(tmp_path / "b", "official", lambda t: change(t, 0.3), "official")
    done, made = convert(tmp_path / "c", "official", lambda t: change(t, 0.3), "fp32")
    expected = made.tensors[f"{WQ_B}.weight"].float() * torch.tensor(0.3)
    np.testing.assert_array_equal(np.asarray(leaf(done, WQ_B)), expected.numpy())
    done, _ = convert(tmp_path / "d", "official", lambda t: change(t, 0.3), "official", allow_inexact=True)
    assert set(done.reports) == {WQ_B} and 0 < done.reports[WQ_B].error.squared_error < 0.01 * done.reports[WQ_B].error.squared_norm


def test_groups_of_wo_a_that_share_a_row_of_blocks(tmp_path):
    """96 rows per group: the second group begins within a block of 128 rows, so it needs both scales, or none."""
    config = dataclasses.replace(config_of("official"), o_lora_rank=96)
    name = "layers.0.attn.wo_a"
    made = Maker(config, "official").make()
    source = write(tmp_path / "source", made)
    with pytest.raises(ValueError, match="wo_a.weight has scales that one power of two"):
        checkpoints.convert(source, tmp_path / "official", "official")
    for recipe in ("fp32", "bf16"):  # e4m3 times a power of two is a bf16 number
        done = checkpoints.convert(source, tmp_path / recipe, recipe)
        values = np.asarray(leaf(done, name)).astype(np.float32)
        np.testing.assert_array_equal(values, made.values[name, None].numpy().reshape(2, 96, 128))
    done = checkpoints.convert(source, tmp_path / "nvfp4", "nvfp4")
    expected = jax.jit(params.convert, static_argnums=1)(made.values[name, None].numpy().reshape(2, 96, 128), "nvfp4")
    np.testing.assert_array_equal(np.asarray(leaf(done, name).data), np.asarray(expected.data))
    np.testing.assert_array_equal(np.asarray(leaf(done, name).global_scale), np.asarray(expected.global_scale))


def test_fp32_values_in_plain_tensors_round_only_where_allowed(tmp_path):
    def change(tensors):
        tensors["norm.weight"] = tensors["norm.weight"].float() + 1e-5

    with pytest.raises(ValueError, match="norm.weight is fp32, and [0-9]+ of its values are no bf16 numbers"):
        convert(tmp_path / "a", "official", change, "official")
    done, made = convert(tmp_path / "b", "official", change, "official", allow_inexact=True)
    assert done.reports["norm"].inexact > 50
    done, made = convert(tmp_path / "c", "official", lambda t: t.update({"norm.weight": t["norm.weight"].float()}), "official")
    assert not done.reports
