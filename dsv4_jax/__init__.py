"""DeepSeek-V4 inference as pure functional JAX.

>>> import dsv4_jax as dsv4
>>> model = dsv4.load("tiny", recipe="bf16")
>>> state = dsv4.init_state(model, batch=1, max_len=1024)
>>> logits, state = dsv4.prefill(model, tokens, lengths, state)
>>> logits, state = dsv4.decode_step(model, next_tokens, state)
>>> for part in dsv4.generate(model, ["def main():"], max_new_tokens=64): print(part.text[0], end="")
"""

from dsv4_jax.config import FLASH, PRO, TINY, ModelConfig
from dsv4_jax.generate import Generated, generate
from dsv4_jax.model import DecodeState, Model, decode_step, forward, init_state, prefill, random_model
from dsv4_jax.pack import pack_for
from dsv4_jax.precision import RECIPES, Recipe
from dsv4_jax.sampling import Greedy, Sample
from dsv4_jax.sharding import make_mesh


def load(path, recipe="official", mesh=None, **options) -> Model:
    """A saved model, or the embedded one ("tiny"), in the formats of `recipe`; see `checkpoints.load`."""
    from checkpoints import load as load_checkpoint

    return load_checkpoint(path, recipe, mesh, **options)
