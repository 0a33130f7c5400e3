"""One token for every row, without the library's modules in between: what a decode step on a CPU should cost.

``decode_step`` is the forward pass of transformers' Qwen3 for one new token a row, on a ``BatchCache``. Linear maps,
embedding and activation are called as the modules they are, so whatever stands in their place (int8, adapters) works;
the rest is written out. Two things differ from the library's pass:

- The query heads that share a key head are attended as rows of one query. The library's fused CPU kernel multiplies
  bf16 row by row when the query has one row, and takes 8 times as long (0.80 against 0.10 ms a layer at 300 positions,
  4.2 against 0.46 at 1536; 16 heads on 8, one thread): at 1536 positions that is more than reading the weights of a 2B
  model.
- Norms, rotary embedding and residuals take a third of the library's calls.

Together, all of a step but its matrix products costs 10 ms instead of 33 at 300 positions and 25 instead of 120 at 1536
(2B shape, bf16, one thread).

Joining ``q``, ``k``, ``v`` or ``gate`` and ``up`` to one matrix was measured and left out: one product of 4096 rows
takes as long as those of 2048, 1024 and 1024. Keeping rotary tables was too: they are made once a step, for all layers.

Values equal the library's up to the order of rounding: bf16 norms round once here and twice there.
"""

import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from .cache import BatchCache
from .modeling import SailVLForConditionalGeneration


def supports(model: SailVLForConditionalGeneration) -> bool:
    """Whether ``decode_step`` computes this model: a dense Qwen3 without sliding windows, on a CPU."""
    lm = model.model.language_model
    return (
        model.device.type == "cpu"
        and model.config.text_config.model_type == "qwen3"
        and all(type(layer) is Qwen3DecoderLayer for layer in lm.layers)
        and set(lm.config.layer_types) == {"full_attention"}
    )


@torch.inference_mode()
def decode_step(model: SailVLForConditionalGeneration, ids_B: torch.Tensor, cache: BatchCache) -> torch.Tensor:
    """Hidden states [B, D] (normed, for the head) of one more token for each of the cache's B rows.

    ``ids_B`` int64 [B]. Keys and values are written to the cache, whose rows are one longer afterwards. Raises
    ValueError for another number of rows. Call it only for models that ``supports`` names.
    """
    if ids_B.shape != (cache.num_rows,):
        raise ValueError(f"ids of shape {list(ids_B.shape)} for {cache.num_rows} rows")
    lm = model.model.language_model
    config = lm.config
    rows, head_size, groups = len(ids_B), config.head_dim, config.num_key_value_heads
    hidden = lm.embed_tokens(ids_B)
    with cache.stepping() as (positions, mask):
        cos, sin = (table.view(rows, 1, head_size) for table in lm.rotary_emb(hidden, positions))
        # Rotating is x cos + turned(x) sin, where turned swaps the halves and negates the first: the sign goes to sin.
        sin = torch.cat((-sin[..., : head_size // 2], sin[..., head_size // 2 :]), dim=-1)
        for index, layer in enumerate(lm.layers):
            attention = layer.self_attn
            normed = _norm(hidden, layer.input_layernorm)
            query = _norm(attention.q_proj(normed).view(rows, -1, head_size), attention.q_norm)
            key = _norm(attention.k_proj(normed).view(rows, -1, head_size), attention.k_norm)
            value = attention.v_proj(normed).view(rows, -1, 1, head_size)
            query = torch.addcmul(query * cos, query.roll(head_size // 2, -1), sin)
            key = torch.addcmul(key * cos, key.roll(head_size // 2, -1), sin)
            keys, values = cache.update(key.unsqueeze(2), value, index)
            mixed = nn.functional.scaled_dot_product_attention(
                query.view(rows, groups, -1, head_size), keys, values, attn_mask=mask, scale=attention.scaling
            )
            hidden = hidden + attention.o_proj(mixed.reshape(rows, -1))
            normed = _norm(hidden, layer.post_attention_layernorm)
            mlp = layer.mlp
            hidden = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        return _norm(hidden, lm.norm)


def _norm(hidden: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return nn.functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)
