# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Learned queries that read any sequence through cross-attention: a fixed number of tokens from any number.

Used twice: grid tokens -> image tokens, and language context -> condition tokens of the denoiser.
Letters: N sequences, Q queries, L memory length, P width, H heads, d head width.
"""

import torch
import torch.nn.functional as F
from torch import nn


class DeemPerceiverAttention(nn.Module):
    """Post-norm multi-head attention with optional LayerNorm over each head's queries and keys."""

    def __init__(self, config, memory_size: int | None = None):
        super().__init__()
        size = config.hidden_size
        head_size = size // config.num_attention_heads
        self.num_heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(memory_size or size, size)
        self.value = nn.Linear(memory_size or size, size)
        eps = config.layer_norm_eps
        self.query_norm = nn.LayerNorm(head_size, eps=eps) if config.qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(head_size, eps=eps) if config.qk_norm else nn.Identity()
        self.output = nn.Linear(size, size)
        self.output_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.output_norm = nn.LayerNorm(size, eps=eps)

    def forward(
        self, hidden_states: torch.Tensor, memory: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden_states (N, Q, P), memory (N, L, M) or None for self-attention, bool mask (N, L) -> (N, Q, P)."""
        memory = hidden_states if memory is None else memory
        query = self.query_norm(self.query(hidden_states).unflatten(-1, (self.num_heads, -1))).transpose(1, 2)
        key = self.key_norm(self.key(memory).unflatten(-1, (self.num_heads, -1))).transpose(1, 2)
        value = self.value(memory).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [N, H, L, d]
        mask = None if mask is None else mask[:, None, None]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        attended = attended.transpose(1, 2).flatten(2)  # [N, Q, P]
        return self.output_norm(self.output_dropout(self.output(attended)) + hidden_states)


class DeemPerceiverLayer(nn.Module):
    def __init__(self, config, layer_idx: int):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.self_attention = DeemPerceiverAttention(config)
        reads_memory = layer_idx % config.cross_attention_frequency == 0
        self.cross_attention = DeemPerceiverAttention(config, config.encoder_hidden_size) if reads_memory else None
        self.intermediate = nn.Linear(size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, size)
        self.output_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.output_norm = nn.LayerNorm(size, eps=eps)

    def forward(self, queries: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        queries = self.self_attention(queries)
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, memory, mask)
        return self.output_norm(self.output_dropout(self.output(F.gelu(self.intermediate(queries)))) + queries)


class DeemPerceiver(nn.Module):
    """BLIP-2's Q-Former without its text branch, with q/k-norm (spec section 2, "Q-Former")."""

    def __init__(self, config):
        super().__init__()
        self.initializer_range = config.initializer_range
        self.queries = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(DeemPerceiverLayer(config, idx) for idx in range(config.num_hidden_layers))

    def forward(self, memory: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """memory (N, L, M), bool mask (N, L) that is True where memory counts -> (N, Q, P)."""
        queries = self.dropout(self.norm(self.queries)).expand(memory.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, memory, mask)
        return queries
