"""A vision transformer for 32 x 32 images (Dosovitskiy et al. 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITION_STD = 0.02  # of the initial position embedding, as ViT


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, T, width] to the same shape."""
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [n, heads, T, width / heads]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(n, tokens, width))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then two linear layers with GELU between."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, T, width] to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Patches as tokens, a learned position each, transformer blocks, the mean token and a linear layer."""

    def __init__(
        self, *, image: int, patch: int, width: int, depth: int, heads: int, hidden: int, num_classes: int
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, (image // patch) ** 2, width))
        nn.init.trunc_normal_(self.position, std=POSITION_STD)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, image, image] to logits [n, num_classes]."""
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def vit_tiny(*, num_classes: int = 10) -> nn.Module:
    """ViT of DeiT-Ti's width (192, 3 heads) and half its depth (6), on 4 x 4 patches of 32 x 32 images.

    Deviation: no class token; the head reads the mean of the tokens.
    """
    return ViT(image=32, patch=4, width=192, depth=6, heads=3, hidden=768, num_classes=num_classes)
