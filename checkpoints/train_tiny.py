"""How the embedded model was made: train TINY on the Python standard library, then store it in the official formats.

    python -m checkpoints.train_tiny --out checkpoints/tiny 

Runs on one GPU (jax with CUDA, optax). Text: every .py file of a Python installation; files are held out by a hash of
their path. Loss: next token, plus 0.3 of the MTP block's, plus the indexer's Kullback-Leibler distance to the
attention over the compressed entries. The last part of the run rounds the weights to MXFP4 and FP8 in the forward
pass, so that what is stored is what was trained. Prints the held-out loss in bits per byte, and keeps its progress in
OUT.progress.npz: a killed run goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import math
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import params
from dsv4_jax.config import CSA, TINY
from dsv4_jax.encoding import BOS, EOS, SPECIAL_TOKENS
from dsv4_jax.model import Model, forward_recorded
from dsv4_jax.precision import BF16, OFFICIAL

LENGTH, BATCH = 1024, 32  # tokens per sequence, sequences per step
QUANTIZED_FROM = 0.7  # fraction of the run after which the forward pass sees rounded weights
HELD_OUT = 50  # one file in so many


def read_files(folder: Path) -> tuple[list[str], list[str]]:
    """(training, held-out) texts of all .py files under `folder`; held out by a hash of the path."""
    train, held = [], []
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if "site-packages" in name or "lib2to3/tests/data" in name or "bad" in path.name:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        digest = int(hashlib.sha256(name.encode()).hexdigest(), 16)
        (held if digest % HELD_OUT == 0 else train).append(text)
    if not train or not held:
        raise ValueError(f"{folder} holds {len(train)} + {len(held)} readable .py files; give a Python library with --corpus.")
    return train, held


def train_tokenizer(texts: list[str], vocab_size: int):
    """Byte-level BPE; the special tokens of the chat format take the first ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[\r\n]+[ \t]*| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in one stream, each between BOS and EOS; uint16."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    ids = [np.asarray([bos, *e.ids, eos], np.uint16) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return np.concatenate(ids)


def initial_weights(key) -> dict:
    """fp32 master weights. Hyper-connections start near the identity, with the streams told apart."""
    weights = params.init(TINY, dataclasses.replace(BF16, dtype="float32"), key, std=0.03)
    m = TINY.hc_mult

    def one(name, param, leaf):
        k = jax.random.fold_in(key, int(hashlib.sha256(name.encode()).hexdigest()[:7], 16))
        if name.endswith(".base"):
            noise = 0.5 * jax.random.normal(k, leaf.shape)
            return noise if leaf.shape[0] == m else noise.at[2 * m :].add(3.0 * jnp.eye(m).reshape(-1))
        if name.endswith(".scale"):
            return leaf * 0.3
        return leaf

    return params.map_params(one, TINY, weights)


def rounded(weights: dict, on: jax.Array) -> dict:
    """Weights as the forward pass sees them: bf16, or if `on` (0 or 1, traced) what the official formats keep, with
    the gradient of the identity."""

    def one(_, param, leaf):
        target = params.storage(param, OFFICIAL)
        if target in ("fp8", "mxfp4"):
            kept = params.convert(params.convert(jax.lax.stop_gradient(leaf), target), "float32")
            leaf = leaf + on * jax.lax.stop_gradient(kept - leaf)
        return leaf.astype(params.storage(param, BF16))

    return params.map_params(one, TINY, weights)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean nats per token."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()


def indexer_loss(record: dict, layer: int) -> jax.Array:
    """Mean KL from the heads' attention over the visible compressed entries to the indexer's softmax."""
    q, keys = record[f"layers.{layer}.q"], record[f"layers.{layer}.compressed"]
    scores = record[f"layers.{layer}.index_scores"]
    q, keys = jax.lax.stop_gradient((q, keys))
    visible = jnp.arange(keys.shape[1]) < ((jnp.arange(q.shape[1]) + 1) // CSA)[:, None]
    logits = jnp.einsum("bthk,bck->bhtc", q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    target = jax.nn.softmax(jnp.where(visible, logits, -1e30), axis=-1).mean(1)
    guess = jax.nn.log_softmax(jnp.where(visible, scores, -1e30), axis=-1)
    kl = jnp.where(visible, target * (jnp.log(target + 1e-20) - guess), 0.0).sum(-1)
    return (kl * visible[:, 0]).sum() / (visible[:, 0].sum() * kl.shape[0])


def loss_and_loads(weights: dict, tokens: jax.Array, quantized: jax.Array):
    """tokens int32 [B, T + 2] -> (loss, (next-token loss, MTP loss, indexer loss, MTP agreement, expert loads))."""
    config = TINY
    model = Model(rounded(weights, quantized), config, BF16)
    logits, record = forward_recorded(model, tokens[:, :-1])
    main = cross_entropy(logits[:, :-1], tokens[:, 1:-1])
    draft = cross_entropy(record["mtp_logits"], tokens[:, 2:])
    index = sum(indexer_loss(record, i) for i, ratio in enumerate(config.layer_ratios) if ratio == CSA)
    agree = (record["mtp_logits"].argmax(-1) == logits[:, 1:].argmax(-1)).mean()
    names = [f"layers.{i}" for i in range(config.num_hidden_layers)] + ["mtp"]
    loads = {n: jnp.bincount(record[f"{n}.experts"].reshape(-1), length=config.n_routed_experts) for n in names}
    return main + 0.3 * draft + index, (main, draft, index, agree, loads)


def balance(weights: dict, loads: dict, rate: float) -> dict:
    """noaux_tc: raise the picking bias of experts below the mean load, lower the others; the last layers' too."""

    def one(name, param, leaf):
        if not name.endswith("gate.bias"):
            return leaf
        load = loads[name.split(".ffn")[0]].astype(jnp.float32)
        return leaf + rate * jnp.sign(load.mean() - load)

    return params.map_params(one, TINY, weights)


def save_progress(path: Path, step: int, tree) -> None:
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, step=step, **{str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))})
    partial.replace(path)


def load_progress(path: Path, tree):
    stored = np.load(path)
    leaves, treedef = jax.tree.flatten(tree)
    return int(stored["step"]), jax.tree.unflatten(treedef, [jnp.asarray(stored[str(i)]) for i in range(len(leaves))])


def evaluate(weights: dict, stream: np.ndarray) -> tuple[float, float]:
    """(nats per token, MTP agreement) of the rounded weights over the held-out stream, in windows of LENGTH."""
    run = jax.jit(lambda w, t: loss_and_loads(w, t, jnp.float32(1))[1][:4])
    count = (len(stream) - 2) // LENGTH
    rows = np.stack([stream[i * LENGTH : (i + 1) * LENGTH + 2] for i in range(count)]).astype(np.int32)
    parts = [run(weights, rows[i : i + BATCH]) for i in range(0, count - BATCH + 1, BATCH)] or [run(weights, rows)]
    main, _, _, agree = np.mean([[float(v) for v in p] for p in parts], axis=0)
    return float(main), float(agree)


def main() -> None:
    import optax

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the new checkpoint")
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="a folder of .py files")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of 32 x 1024 tokens")
    parser.add_argument("--minutes", type=float, default=20.0, help="stop, finished or not, after this long")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()

    train, held = read_files(args.corpus)
    tokenizer = train_tokenizer(train, TINY.vocab_size)
    stream, test = encode(tokenizer, train), encode(tokenizer, held)
    held_bytes = sum(len(t.encode()) for t in held)
    print(f"{len(train)} files, {len(stream)} tokens; held out {len(held)} files, {len(test)} tokens", flush=True)

    weights = initial_weights(jax.random.key(args.seed))
    learnable = params.map_params(lambda n, p, _: p.role != "int32" and not n.endswith("gate.bias"), TINY, weights)
    decays = params.map_params(lambda n, p, _: len(p.shape) > 1 and p.role != "int32", TINY, weights)
    peak = 2.5e-3
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, min(100, args.steps // 2), args.steps, peak * 0.02)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.95, weight_decay=0.1, mask=decays))
    frozen = jax.tree.map(lambda on: "train" if on else "freeze", learnable)
    optimizer = optax.multi_transform({"train": adam, "freeze": optax.set_to_zero()}, frozen)
    state = optimizer.init(weights)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(weights, state, tokens, quantized):
        grad = jax.value_and_grad(loss_and_loads, has_aux=True, allow_int=True)
        (_, aux), grads = grad(weights, tokens, quantized)
        grads = jax.tree.map(lambda g, w: jnp.zeros_like(w) if g.dtype == jax.dtypes.float0 else g, grads, weights)
        updates, state = optimizer.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        return balance(weights, aux[-1], 1e-3), state, aux[:4]

    progress = args.out.with_name(args.out.name + ".progress.npz")
    first = step = 0
    if progress.exists():
        first, (weights, state) = load_progress(progress, (weights, state))
        print(f"resumed at step {first}", flush=True)
    for step in range(first, args.steps):
        rng = np.random.default_rng((args.seed, step))
        at = rng.integers(0, len(stream) - LENGTH - 2, BATCH)
        tokens = np.stack([stream[i : i + LENGTH + 2] for i in at]).astype(np.int32)
        quantized = np.float32(step >= QUANTIZED_FROM * args.steps)
        weights, state, losses = train_step(weights, state, tokens, quantized)
        if step % 100 == 0 or step == args.steps - 1:
            values = [float(v) for v in losses]
            print(
                f"step {step} loss {values[0]:.4f} mtp {values[1]:.4f} index {values[2]:.4f} agree {values[3]:.3f} "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
            if not math.isfinite(values[0]):
                raise SystemExit(f"the loss is {values[0]} at step {step}; lower the learning rate.")
        late = time.monotonic() - began > 60 * args.minutes
        if step % 500 == 499 or late or step == args.steps - 1:
            save_progress(progress, step + 1, (weights, state))
        if late:
            print(f"out of time at step {step} of {args.steps}", flush=True)
            break

    nats, agree = evaluate(weights, test)
    bits = nats / math.log(2) * len(test) / held_bytes
    print(f"held out: {nats:.4f} nats per token, {bits:.4f} bits per byte, MTP agreement {agree:.3f}", flush=True)
    stored = jax.jit(lambda w: params.to_recipe(w, TINY, OFFICIAL))(weights)
    facts = {"held_out_bits_per_byte": bits, "held_out_nats_per_token": nats, "mtp_agreement": agree, "steps": step + 1}
    from checkpoints.store import save

    save(Model(stored, TINY, OFFICIAL), args.out, tokenizer_json=tokenizer.to_str(), metadata=facts)
    progress.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
