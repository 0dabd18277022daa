"""DeepSeek-V4 stated once more, in torch: one whole sequence in, logits out. The oracle of the model tests.

No cache, no batch, no kernels: attention is dense with a mask. Arithmetic is fp32; values are rounded to the
activation dtype only where the model stores them. Section numbers refer to the technical report (arXiv 2606.19348).

Shapes: T tokens, D model, M streams, H heads, K head_dim, R rope, G output groups, E experts, F expert width,
C compressed entries, X top-k, V vocabulary.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from oracle.formats import fp4_round, fp8_round, hadamard


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last axis, largest first; of equal scores the lower index comes first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def rope_frequencies(dims: int, theta: float, scaling: dict | None) -> Tensor:
    """Angle per position of each of the R/2 interleaved pairs, fp32; with YaRN if `scaling` is given."""
    freqs = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    if scaling is None:
        return freqs

    def pair_turning(times: float) -> float:  # the (fractional) pair that turns `times` times in the original context
        context = scaling["original_max_position_embeddings"]
        return dims * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair_turning(scaling["beta_slow"])), dims - 1)
    width = high - low if high != low else 0.001
    keep = 1 - ((torch.arange(dims // 2) - low) / width).clamp(0, 1)
    return freqs / scaling["factor"] * (1 - keep) + freqs * keep


def rotate(x: Tensor, positions: Tensor, freqs: Tensor, inverse: bool = False) -> Tensor:
    """RoPE on the last R dims of x [T, ..., K]; pairs are neighbours. Computed in fp32, returned in x's dtype."""
    angles = positions[:, None].float() * freqs
    angles = angles.view(len(positions), *[1] * (x.dim() - 2), len(freqs))
    cos, sin = angles.cos(), -angles.sin() if inverse else angles.sin()
    nope, rope = x[..., : -2 * len(freqs)].float(), x[..., -2 * len(freqs) :].float()
    even, odd = rope[..., 0::2], rope[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([nope, turned], -1).to(x.dtype)


class Oracle:
    """The model as a function of official `config` keys and dequantized `weights` under official names.

    `dtype` is what activations are rounded to (float32 or bfloat16). `quantize=True` adds the official simulation:
    FP8 inputs of the FP8 and FP4 linears, FP8 nope dims of the window and compressed KV, Hadamard + FP4 for indexer
    q and k. Weights are used as given.
    """

    def __init__(self, config: dict, weights: dict[str, Tensor], *, dtype=torch.float32, quantize: bool = False):
        self.config, self.weights, self.dtype, self.quantize = config, weights, dtype, quantize

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> dict:
        """tokens long [T] -> dict of

        logits fp32 [T, V];
        hidden [T, M, D], the residual streams before the head;
        sites: "layers.N.attn" and "layers.N.ffn" [T, D], the sublayer outputs; for ratio 4 "layers.N.topk" long
            [T, index_topk], entries by falling index score, -1 behind the visible ones; the same for "mtp.0";
        mtp_logits fp32 [T - 1, V], or None without MTP weights: row p has seen token p + 1 and predicts token p + 2.
        """
        c, sites = self.config, {}
        embedded = self.w("embed.weight")[tokens].to(self.dtype)
        streams = embedded[:, None].expand(-1, c["hc_mult"], -1)
        for layer in range(c["num_hidden_layers"]):
            hashed = layer < c["num_hash_layers"]
            streams = self.block(streams, tokens, f"layers.{layer}", c["compress_ratios"][layer], hashed, sites)
        mtp_logits = self.mtp(streams, tokens, sites) if "mtp.0.e_proj.weight" in self.weights else None
        return {"logits": self.head(streams, ""), "hidden": streams, "sites": sites, "mtp_logits": mtp_logits}

    def mtp(self, streams: Tensor, tokens: Tensor, sites: dict) -> Tensor:
        """Multi-token prediction: hidden of token p and embedding of token p + 1 through one more block."""
        if len(tokens) == 1:
            return torch.empty(0, self.config["vocab_size"])
        embedded = self.w("embed.weight")[tokens[1:]].to(self.dtype)
        from_token = self.fp8_linear(self.norm(embedded, "mtp.0.enorm"), "mtp.0.e_proj")
        from_hidden = self.fp8_linear(self.norm(streams[:-1], "mtp.0.hnorm"), "mtp.0.h_proj")
        streams = (from_token[:, None].float() + from_hidden.float()).to(self.dtype)
        ratio = self.config["compress_ratios"][self.config["num_hidden_layers"]]
        return self.head(self.block(streams, tokens[1:], "mtp.0", ratio, False, sites), "mtp.0.")

    def block(self, streams: Tensor, tokens: Tensor, name: str, ratio: int, hashed: bool, sites: dict) -> Tensor:
        x, post, comb = self.hc_pre(streams, f"{name}.hc_attn")
        attn = self.attention(self.norm(x, f"{name}.attn_norm"), f"{name}.attn", ratio, sites)
        streams = self.hc_post(attn, streams, post, comb)
        x, post, comb = self.hc_pre(streams, f"{name}.hc_ffn")
        ffn = self.moe(self.norm(x, f"{name}.ffn_norm"), tokens, f"{name}.ffn", hashed)
        sites[f"{name}.attn"], sites[f"{name}.ffn"] = attn, ffn
        return self.hc_post(ffn, streams, post, comb)

    # Building pieces.

    def w(self, name: str) -> Tensor:
        return self.weights[name].float()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return (x.float() @ self.w(f"{name}.weight").T).to(self.dtype)

    def fp8_input(self, x: Tensor) -> Tensor:
        return fp8_round(x, 128) if self.quantize else x.float()

    def fp8_linear(self, x: Tensor, name: str) -> Tensor:
        """A linear whose input the official recipe quantizes."""
        return self.linear(self.fp8_input(x), name)

    def norm(self, x: Tensor, name: str | None) -> Tensor:
        """RMSNorm over the last axis; without a name, without a weight."""
        x = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return (x if name is None else x * self.w(f"{name}.weight")).to(self.dtype)

    # Manifold-constrained hyper-connections.

    def hc_mix(self, streams: Tensor, fn: str) -> Tensor:
        x = streams.float().flatten(1)
        return (x @ self.w(fn).T) * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])

    def hc_pre(self, streams: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """streams [T, M, D] -> sublayer input [T, D], post [T, M], comb [T, M from, M to]."""
        m, eps = self.config["hc_mult"], self.config["hc_eps"]
        mix, base, scale = self.hc_mix(streams, f"{name}_fn"), self.w(f"{name}_base"), self.w(f"{name}_scale")
        pre = torch.sigmoid(mix[:, :m] * scale[0] + base[:m]) + eps
        post = 2 * torch.sigmoid(mix[:, m : 2 * m] * scale[1] + base[m : 2 * m])
        comb = (mix[:, 2 * m :] * scale[2] + base[2 * m :]).unflatten(1, (m, m)).softmax(-1) + eps
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
        for _ in range(self.config["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + eps)
            comb = comb / (comb.sum(-2, keepdim=True) + eps)
        return (pre[..., None] * streams.float()).sum(1).to(self.dtype), post, comb

    def hc_post(self, out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        carried = torch.einsum("tjk,tjd->tkd", comb, streams.float())
        return (post[..., None] * out.float()[:, None] + carried).to(self.dtype)

    def head(self, streams: Tensor, prefix: str) -> Tensor:
        mix = self.hc_mix(streams, f"{prefix}hc_head_fn")
        pre = torch.sigmoid(mix * self.w(f"{prefix}hc_head_scale") + self.w(f"{prefix}hc_head_base"))
        x = ((pre + self.config["hc_eps"])[..., None] * streams.float()).sum(1).to(self.dtype)
        return self.norm(x, f"{prefix}norm").float() @ self.w("head.weight").T

    # Attention.

    def freqs(self, ratio: int) -> Tensor:
        c = self.config
        if ratio == 0:
            return rope_frequencies(c["qk_rope_head_dim"], c["rope_theta"], None)
        return rope_frequencies(c["qk_rope_head_dim"], c["compress_rope_theta"], c["rope_scaling"])

    def attention(self, x: Tensor, name: str, ratio: int, sites: dict) -> Tensor:
        """x [T, D] -> [T, D]: one KV head over the window and, for ratio > 0, compressed entries."""
        c, freqs, positions = self.config, self.freqs(ratio), torch.arange(len(x))
        q_latent = self.norm(self.fp8_linear(x, f"{name}.wq_a"), f"{name}.q_norm")
        q = self.fp8_linear(q_latent, f"{name}.wq_b").unflatten(1, (c["num_attention_heads"], c["head_dim"]))
        q = rotate(self.norm(q, None), positions, freqs)
        kv = rotate(self.norm(self.fp8_linear(x, f"{name}.wkv"), f"{name}.kv_norm"), positions, freqs)

        keys = self.stored_kv(kv)
        age = positions[:, None] - positions
        visible = (age >= 0) & (age < c["sliding_window"])
        if ratio:
            keys = torch.cat([keys, self.stored_kv(self.compress(x, f"{name}.compressor", ratio, c["head_dim"]))])
            closed = torch.arange(len(x) // ratio) < (positions[:, None] + 1) // ratio  # [T, C]
            if ratio == 4:
                top = self.indexer(x, q_latent, f"{name}.indexer", closed)
                sites[name.removesuffix("attn") + "topk"] = top
                closed = (top[..., None] == torch.arange(closed.shape[1])).any(1)
            visible = torch.cat([visible, closed], 1)

        scores = torch.einsum("thk,sk->hts", q.float(), keys.float()) * c["head_dim"] ** -0.5
        scores = scores.masked_fill(~visible, -math.inf)
        highest = scores.amax(-1, keepdim=True)
        weight = (scores - highest).exp()
        sink = (self.w(f"{name}.attn_sink")[:, None, None] - highest).exp()
        # The denominator sums the unrounded weights. In float64, so that no rounding depends on the number of keys.
        total = weight.double().sum(-1, keepdim=True) + sink
        out = torch.einsum("hts,sk->htk", weight.to(self.dtype).double(), keys.double()) / total
        out = out.transpose(0, 1).to(self.dtype)
        out = rotate(out, positions, freqs, inverse=True)

        grouped = out.float().flatten(1).unflatten(1, (c["o_groups"], -1))
        wo_a = self.w(f"{name}.wo_a.weight").unflatten(0, (c["o_groups"], c["o_lora_rank"]))
        return self.fp8_linear(torch.einsum("tgi,goi->tgo", grouped, wo_a).flatten(1).to(self.dtype), f"{name}.wo_b")

    def stored_kv(self, kv: Tensor) -> Tensor:
        """What the KV cache gives back: nope dims through FP8 in blocks of 64, rope dims as they are."""
        if not self.quantize:
            return kv
        nope = kv.shape[-1] - self.config["qk_rope_head_dim"]
        return torch.cat([fp8_round(kv[..., :nope], 64).to(self.dtype), kv[..., nope:]], -1)

    def compress(self, x: Tensor, name: str, ratio: int, width: int) -> Tensor:
        """x [T, D] -> one entry per closed block of `ratio` tokens, [C, width], normed and rotated. Pooling is fp32."""
        blocks = x[: len(x) // ratio * ratio].float().unflatten(0, (-1, ratio))
        kv = blocks @ self.w(f"{name}.wkv.weight").T
        scores = blocks @ self.w(f"{name}.wgate.weight").T + self.w(f"{name}.ape")
        if ratio == 4:  # overlapping: the first half of the channels pools a block into the entry after its own
            before = torch.zeros_like(kv[:1, :, :width])
            kv = torch.cat([torch.cat([before, kv[:, :, :width]])[:-1], kv[:, :, width:]], 1)
            before = torch.full_like(before, -math.inf)
            scores = torch.cat([torch.cat([before, scores[:, :, :width]])[:-1], scores[:, :, width:]], 1)
        pooled = (scores.softmax(1) * kv).sum(1).to(self.dtype)
        return rotate(self.norm(pooled, f"{name}.norm"), torch.arange(len(pooled)) * ratio, self.freqs(ratio))

    def indexer(self, x: Tensor, q_latent: Tensor, name: str, closed: Tensor) -> Tensor:
        """Compressed entries each token attends to: long [T, index_topk] into C; `closed` [T, C] are the candidates."""
        c = self.config
        heads, width, k = c["index_n_heads"], c["index_head_dim"], c["index_topk"]
        q = self.fp8_linear(q_latent, f"{name}.wq_b").unflatten(1, (heads, width))
        q = self.stored_index(rotate(q, torch.arange(len(x)), self.freqs(4)))
        keys = self.stored_index(self.compress(x, f"{name}.compressor", 4, width))
        weight = self.linear(x, f"{name}.weights_proj").float() * width**-0.5 * heads**-0.5
        scores = (torch.einsum("thk,ck->thc", q.float(), keys.float()).relu() * weight[..., None]).sum(1)
        top = top_indices(scores.masked_fill(~closed, -math.inf), k)
        top = top.masked_fill(torch.arange(top.shape[1]) >= closed.sum(1, keepdim=True), -1)
        return torch.nn.functional.pad(top, (0, k - top.shape[1]), value=-1)

    def stored_index(self, x: Tensor) -> Tensor:
        """Indexer queries and keys as the official recipe keeps them: Hadamard-rotated, then FP4."""
        if not self.quantize:
            return x
        n = x.shape[-1]
        return fp4_round((x.float() @ hadamard(n) * n**-0.5).to(self.dtype)).to(self.dtype)

    # Mixture of experts.

    def moe(self, x: Tensor, tokens: Tensor, name: str, hashed: bool) -> Tensor:
        c = self.config
        scores = softplus(x.float() @ self.w(f"{name}.gate.weight").T).sqrt()
        if hashed:
            picked = self.weights[f"{name}.gate.tid2eid"][tokens].long()
        else:
            picked = top_indices(scores + self.w(f"{name}.gate.bias"), c["num_experts_per_tok"])
        weight = scores.gather(1, picked)
        weight = weight / weight.sum(1, keepdim=True) * c["routed_scaling_factor"]

        out = torch.zeros(x.shape)
        for expert in picked.unique().tolist():
            row, slot = torch.where(picked == expert)
            out.index_add_(0, row, self.expert(x[row], f"{name}.experts.{expert}", weight[row, slot, None]))
        return (out + self.expert(x, f"{name}.shared_experts", 1.0)).to(self.dtype)

    def expert(self, x: Tensor, name: str, weight: Tensor | float) -> Tensor:
        """x [T, D] -> fp32 [T, D]; the routing weight acts before w2."""
        limit = self.config["swiglu_limit"]
        gate = self.fp8_linear(x, f"{name}.w1").float().clamp(max=limit)
        up = self.fp8_linear(x, f"{name}.w3").float().clamp(-limit, limit)
        hidden = (silu(gate) * up * weight).to(self.dtype)
        return self.fp8_input(hidden) @ self.w(f"{name}.w2.weight").T
