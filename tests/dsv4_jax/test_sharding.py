"""Eight CPU devices: the same tokens as one device, the collectives that the design counts, caches aliased."""

import collections
import dataclasses
import re

import jax
import numpy as np
import pytest

import dsv4_jax as dsv4
from dsv4_jax import params
from dsv4_jax.bench import hlo_op_counts, lower
from dsv4_jax.generate import generate
from dsv4_jax.model import Model, _decode_step
from dsv4_jax.sharding import check_mesh, make_mesh
from models import PAIR, SMALL, small_model, tokens

LAYERS = PAIR.num_hidden_layers


def split(model: Model, mesh, expert_sharding="width") -> Model:
    out = dataclasses.replace(model, mesh=mesh, expert_sharding=expert_sharding)
    return dataclasses.replace(out, weights=jax.device_put(model.weights, params.shardings(out.context)))


def continuations(model, count=40, **options):
    prompts = [tokens(n, seed=n)[0].tolist() for n in (3, 140, 20, 64)]
    out = [[] for _ in prompts]
    for part in generate(model, prompts, count, stop_ids=(), **options):
        for row, new in zip(out, part.tokens):
            row.extend(new)
    return out


@pytest.mark.parametrize("data, tensor, experts", [(1, 8, "width"), (2, 4, "experts"), (4, 2, "width")])
def test_same_tokens_as_one_device(data, tensor, experts):
    model = small_model("fp32")
    assert continuations(split(model, make_mesh(data, tensor), experts)) == continuations(model)


def test_speculation_on_a_mesh():
    model = small_model("fp32")
    assert continuations(split(model, make_mesh(2, 2)), draft_tokens=2) == continuations(model)


def test_forward_on_a_mesh():
    model, rows = small_model("fp32"), tokens(140, batch=2)
    np.testing.assert_allclose(
        dsv4.forward(split(model, make_mesh(2, 4)), rows), dsv4.forward(model, rows), atol=2e-5
    )


@pytest.mark.parametrize("recipe, tensor", [("bf16", 8), ("official", 2), ("nvfp4", 4)])
def test_logits_of_other_recipes(recipe, tensor):
    """Rounding to bf16 after another order of summation may flip a route, hence the median."""
    model, rows = small_model(recipe, PAIR), tokens(60, batch=2, seed=1)
    want = np.asarray(dsv4.forward(model, rows))
    got = np.asarray(dsv4.forward(split(model, make_mesh(2, tensor) if tensor < 8 else make_mesh(1, 8)), rows))
    cosine = (want * got).sum(-1) / np.linalg.norm(want, axis=-1) / np.linalg.norm(got, axis=-1)
    assert np.median(cosine) > 0.99, np.median(cosine)


@pytest.mark.parametrize("recipe, tensor, maxima", [("bf16", 8, 0), ("official", 2, 0), ("nvfp4", 4, 2)])
def test_collectives_and_aliasing_of_a_step(recipe, tensor, maxima):
    """Per layer one all-reduce after wo_b and one after the experts; the embedding and the logits are gathered.
    NVFP4 needs the largest magnitude of two split rows per layer. Every cache is updated in place."""
    model = split(small_model(recipe, PAIR), make_mesh(1, tensor))
    state = dsv4.init_state(model, 1, 256)
    text = _decode_step.lower(model, np.zeros(1, np.int32), state).compile().as_text()
    reductions = collections.Counter(
        "maximum" if "max" in re.search(r"to_apply=%?([\w.\-]+)", line).group(1).lower() or _is_max(text, line) else "add"
        for line in text.splitlines() if re.search(r"= .*\sall-reduce\(", line)
    )  # fmt: skip
    assert hlo_op_counts(text)["all-gather"] == 2
    assert reductions["add"] == 2 * LAYERS
    # wo_b's input, w2 of the routed experts (and of the shared expert, which XLA may merge with it)
    assert maxima * LAYERS <= reductions["maximum"] <= (maxima + 1) * LAYERS if maxima else not reductions["maximum"]
    for other in ("all-to-all", "reduce-scatter", "collective-permute"):
        assert not hlo_op_counts(text)[other]
    aliased = text.split("input_output_alias={")[1].split("entry_computation")[0]
    assert aliased.count("-alias)") == len(jax.tree.leaves(state))


def _is_max(text: str, line: str) -> bool:
    name = re.search(r"to_apply=%?([\w.\-]+)", line).group(1)
    body = re.search(rf"%?{re.escape(name)} \([^)]*\) -> .*?\{{(.*?)\n\}}", text, re.S).group(1)
    return "maximum(" in body


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_published_sizes_trace_and_lower(name):
    figures = lower(name, "official", make_mesh(1, 8))
    layers = {"flash": 43, "pro": 61}[name]
    assert figures["collectives"] == {"all_reduce": 2 * layers, "all_gather": 2}
    assert figures["trace_and_lower_s"] < 60
    total = {"flash": 159.6e9, "pro": 864.7e9}[name]  # facts section 4
    assert abs(figures["weight_bytes"] - total) < 0.001 * total
    assert figures["weight_bytes_per_device"] < total / 7
    assert int(figures["state_bytes_per_token"]) == {"flash": 3514, "pro": 5031}[name]  # facts section 5


def test_wrong_meshes_are_sentences():
    model = small_model("official")
    with pytest.raises(ValueError, match="needs 16 devices, but there are 8"):
        make_mesh(2, 8)
    with pytest.raises(ValueError, match="tensor=3 does not divide num_attention_heads = 8"):
        check_mesh(SMALL, make_mesh(1, 3), "width")
    with pytest.raises(ValueError, match="'data', 'tensor'"):
        check_mesh(SMALL, jax.make_mesh((8,), ("x",)), "width")
    with pytest.raises(ValueError, match="expert_sharding = 'columns'"):
        check_mesh(SMALL, None, "columns")
    with pytest.raises(ValueError, match=r"wo_b .* in format fp8 cannot be split 8 ways"):
        split(model, make_mesh(1, 8))
    with pytest.raises(ValueError, match="batch of 3 cannot be split over data=2"):
        dsv4.init_state(split(model, make_mesh(2, 1)), 3, 64)
