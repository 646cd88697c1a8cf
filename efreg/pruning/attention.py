"""torch's multi-head attention, with heads fewer or narrower than its embedding."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PrunedAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads are not embed_dim / num_heads wide: softmax(q kᵀ / scale) v.

    Parameters have the names of the original: in_proj_weight [2 H d_k + H d_v, E] (or q, k and v apart),
    out_proj [E, H d_v]. The scale is that of the network it was cut from. It is made from an original by
    `as_pruned`.
    """

    num_heads: int
    temperature: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: the output [L, B, E], and the weights where they are needed."""
        batched = query.ndim == 3
        turned = batched and not self.batch_first
        q, k, v = (x.transpose(0, 1) if turned else x if batched else x[None] for x in (query, key, value))
        q, k, v = self._project(q, k, v)
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        bias = self._bias(q, key_padding_mask, attn_mask)
        if bias is not None:
            bias = F.pad(bias, (0, k.shape[2] - key.shape[-3 if turned else -2] if bias.shape[-1] > 1 else 0))
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.temperature
            weights = torch.softmax(scores if bias is None else scores + bias, -1)
            mixed = F.dropout(weights, self.dropout, self.training) @ v
        else:
            dropout = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=self.temperature)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        out = out.transpose(0, 1) if turned else out if batched else out[0]
        if not need_weights:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights[0]

    def _project(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Each as [batch, heads, length, width]."""
        if self.in_proj_weight is not None:
            wide = self.out_proj.in_features
            narrow = (len(self.in_proj_weight) - wide) // 2
            weights = self.in_proj_weight.split([narrow, narrow, wide])
            biases = (
                (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split([narrow, narrow, wide])
            )
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            sizes = [len(w) for w in weights]
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        projected = [F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases)]
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected]

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values with a learned one and one of zeros more, where there are, which no mask hides."""
        if bias is not None:
            own = bias.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            x = torch.cat([x, own.expand(len(x), -1, -1, -1)], 2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _bias(self, q: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Both masks, added up: [batch or 1, heads or 1, queries or 1, keys]; None where there is neither."""

        def additive(x: Tensor) -> Tensor:
            return q.new_zeros(x.shape).masked_fill(x, float("-inf")) if x.dtype == torch.bool else x.to(q)

        if mask is None and padding is None:
            return None
        bias = q.new_zeros(1, 1, 1, 1)
        if mask is not None:
            bias = bias + (additive(mask) if mask.ndim == 2 else additive(mask).unflatten(0, (len(q), -1)))
        if padding is not None:
            padding = padding if padding.ndim == 2 else padding[None]
            bias = bias + additive(padding)[:, None, None]
        return bias


def as_pruned(module: nn.MultiheadAttention, heads: int) -> None:
    """Makes a `nn.MultiheadAttention`, whose tensors have been sliced, one with this many heads, in place."""
    module.temperature = module.head_dim**-0.5
    module.num_heads = heads
    module.out_proj.in_features = module.out_proj.weight.shape[1]
    module._qkv_same_embed_dim = (
        False  # keeps torch's fused encoder layer, which counts on the embedding, away
    )
    module.__class__ = PrunedAttention
