# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The perceiver against transformers' Q-Former and against its own promises."""

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from modeling_deem import DeemPerceiverConfig
from modeling_deem.perceiver_deem import DeemPerceiver, DeemPerceiverAttention

N, L, MEMORY = 3, 7, 20


def config(**changes) -> DeemPerceiverConfig:
    fields = {
        "num_queries": 5,
        "hidden_size": 24,
        "encoder_hidden_size": MEMORY,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "cross_attention_frequency": 2,
    }
    return DeemPerceiverConfig(**(fields | changes))


def perceiver(**changes) -> DeemPerceiver:
    torch.manual_seed(0)
    module = DeemPerceiver(config(**changes)).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def memory(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, L, MEMORY, generator=torch.Generator().manual_seed(seed))


# Names of transformers' Q-Former for ours.
NAMES = [
    ("layers.", "encoder.layer."),
    (".self_attention.output_norm.", ".attention.output.LayerNorm."),
    (".self_attention.output.", ".attention.output.dense."),
    (".self_attention.", ".attention.attention."),
    (".cross_attention.output_norm.", ".crossattention.output.LayerNorm."),
    (".cross_attention.output.", ".crossattention.output.dense."),
    (".cross_attention.", ".crossattention.attention."),
    (".intermediate.", ".intermediate_query.dense."),
    (".output_norm.", ".output_query.LayerNorm."),
    (".output.", ".output_query.dense."),
]


def q_former_name(name: str) -> str:
    if name.startswith("norm."):
        return name.replace("norm.", "layernorm.")
    name = name.replace(*NAMES[0])
    for ours, theirs in NAMES[1:]:
        if ours in name:
            return name.replace(ours, theirs)
    raise AssertionError(name)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_q_former_of_transformers_without_qk_norm(masked: bool) -> None:
    module = perceiver(qk_norm=False)
    q_former = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=24,
            encoder_hidden_size=MEMORY,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=32,
            cross_attention_frequency=2,
        )
    ).eval()
    state = {q_former_name(name): tensor for name, tensor in module.state_dict().items() if name != "queries"}
    report = q_former.load_state_dict(state, strict=False)
    assert not report.unexpected_keys and not report.missing_keys
    mask = torch.ones(N, L, dtype=torch.bool)
    if masked:
        mask[0, 2:], mask[1, :3] = False, False
    with torch.no_grad():
        ours = module(memory(), mask if masked else None)
        theirs = q_former(
            query_embeds=module.queries.expand(N, -1, -1),
            encoder_hidden_states=memory(),
            encoder_attention_mask=mask.long(),
        ).last_hidden_state
    assert ours.shape == (N, 5, 24)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_attention_with_qk_norm_equals_its_definition() -> None:
    torch.manual_seed(0)
    attention = DeemPerceiverAttention(config(), MEMORY)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    queries = torch.randn(1, 2, 24)
    one = memory()[:1]
    with torch.no_grad():
        heads = []
        for head in range(4):
            part = slice(6 * head, 6 * head + 6)
            query = attention.query_norm(attention.query(queries)[..., part])
            key = attention.key_norm(attention.key(one)[..., part])
            weights = (query @ key.transpose(1, 2) / 6**0.5).softmax(-1)
            heads.append(weights @ attention.value(one)[..., part])
        expected = attention.output_norm(attention.output(torch.cat(heads, -1)) + queries)
        torch.testing.assert_close(attention(queries, one), expected)
    assert attention.query_norm.normalized_shape == (6,) and attention.query_norm.eps == 1e-12


def test_cross_attention_stands_in_every_second_layer() -> None:
    assert [layer.cross_attention is not None for layer in perceiver().layers] == [True, False, True]
    assert all(layer.cross_attention for layer in perceiver(cross_attention_frequency=1).layers)


def test_masked_memory_is_not_read_and_padding_changes_nothing() -> None:
    module = perceiver()
    mask = torch.arange(L).expand(N, L) < torch.tensor([[2], [L], [4]])
    changed = memory() + 5 * torch.randn(N, L, MEMORY) * ~mask[..., None]
    with torch.no_grad():
        expected = module(memory(), mask)
        torch.testing.assert_close(module(changed, mask), expected)
        for row, length in enumerate((2, L, 4)):
            alone = module(memory()[row : row + 1, :length])
            torch.testing.assert_close(alone, expected[row : row + 1], rtol=0, atol=1e-5)
        assert not torch.allclose(module(changed), expected, atol=1e-3)


def test_order_of_memory_does_not_matter_and_queries_differ() -> None:
    module = perceiver()
    with torch.no_grad():
        output = module(memory())
        torch.testing.assert_close(module(memory().flip(1)), output, rtol=0, atol=1e-5)
        assert (output[:, 0] - output[:, 1]).abs().max() > 1e-3


def test_dropout_works_in_training_only() -> None:
    module = perceiver(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    with torch.no_grad():
        assert torch.equal(module(memory()), module(memory()))
        module.train()
        assert not torch.allclose(module(memory()), module(memory()))


def test_every_parameter_gets_a_gradient() -> None:
    module = perceiver()
    module(memory()).square().sum().backward()
    silent = {name for name, parameter in module.named_parameters() if parameter.grad.abs().max() < 1e-7}
    # A shift common to all keys leaves a softmax as it is, so these have no gradient but rounding.
    assert {name for name in silent if not name.endswith("key_norm.bias")} == set()
