"""Documents packed into one sequence do not leak into each other."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from steplm.data.loader import Batch
from steplm.errors import ConfigError
from steplm.models.build import build_model, hf_config, initial_state
from steplm.models.forward import batch_loss, check_loss, mean_loss

FAMILIES = ("llama", "qwen3", "gemma", "mistral")
LENGTHS = (7, 5, 4)


def _model(model_type: str):  # type: ignore[no-untyped-def]
    values = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    config = hf_config(values)
    return build_model(config, initial_state(config, seed=0, dtype=torch.float32))


def _packed() -> Batch:
    """Three documents in one row; the first token of a document is nobody's label."""
    tokens = torch.randint(0, 50, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, dims=1)
    labels[:, [6, 11, 15]] = -100
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).expand(2, -1)
    return Batch(tokens, labels, positions)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_documents_have_the_loss_of_separate_ones(model_type: str, checkpointing: bool) -> None:
    model, packed = _model(model_type), _packed()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    together = batch_loss(model, packed.input_ids, packed.labels, packed.position_ids, num_valid=1, chunk_size=64)
    apart = torch.zeros(())
    start = 0
    for length in LENGTHS:
        part = slice(start, start + length)
        apart = apart + batch_loss(
            model, packed.input_ids[:, part], packed.labels[:, part], None, num_valid=1, chunk_size=64
        )
        start += length
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_another_first_document_changes_nothing_in_the_others(model_type: str) -> None:
    model, packed = _model(model_type).eval(), _packed()
    others = packed.labels.clone()
    others[:, :7] = -100
    changed = packed.input_ids.clone()
    changed[:, :7] = (changed[:, :7] + 13) % 50
    with torch.no_grad():
        before, after = (
            batch_loss(model, ids, others, packed.position_ids, num_valid=1, chunk_size=64)
            for ids in (packed.input_ids, changed)
        )
        leaking = batch_loss(model, changed, others, None, num_valid=1, chunk_size=64)
    assert torch.equal(before, after)
    assert not torch.equal(before, leaking), "without position ids the documents do see each other"


def test_the_mean_is_over_tokens_not_over_batches() -> None:
    model, packed = _model("llama"), _packed()
    uneven = [Batch(packed.input_ids[:1], packed.labels[:1]), Batch(packed.input_ids[1:, :4], packed.labels[1:, :4])]
    mean, count = mean_loss(model, uneven, chunk_size=64)
    assert count == 13 + 4
    sums = [batch_loss(model.eval(), b.input_ids, b.labels, num_valid=1, chunk_size=64).item() for b in uneven]
    assert mean == pytest.approx(sum(sums) / 17, rel=1e-6)


class ScaledLlama(LlamaForCausalLM):
    """A family that scales its logits by a key of its own."""

    factor = 1.0

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.factor
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_logits_that_the_loss_does_not_know_of_are_refused_on_fresh_weights(dtype: torch.dtype, training: bool) -> None:
    """On fresh weights the mean loss is log V whatever the scale; the check must see it all the same."""
    config = _model("llama").config
    torch.manual_seed(0)
    model = ScaledLlama(config).to(dtype).train(training)
    check_loss(model, sequence_length=1024)
    for factor in (0.9, 3.0, float("nan")):
        model.factor = factor
        with pytest.raises(ConfigError, match="model_type 'llama'") as caught:
            check_loss(model, sequence_length=1024)
        assert caught.value.model_type == "llama"
    assert model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", [*FAMILIES, "gemma2", "cohere", "granite"])
def test_known_families_pass_the_check_of_their_loss(model_type: str, dtype: torch.dtype) -> None:
    model = _model(model_type).to(dtype)
    check_loss(model, sequence_length=8)
    with torch.no_grad():  # as after training, when caps are felt
        model.get_output_embeddings().weight.mul_(20)
    check_loss(model, sequence_length=1024)
