import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steplm.pet.host import LayerFetcher, host_buffer, lay_out
from steplm.pet.packing import Part

CPU = torch.device("cpu")


def fetcher_of(num_layers: int) -> LayerFetcher:
    """Layer i is 5 + i bytes of the value i."""
    return LayerFetcher({f"layers.{i}": torch.full((5 + i,), i, dtype=torch.uint8) for i in range(num_layers)}, CPU)


@given(num_layers=st.integers(1, 5), wishes=st.lists(st.integers(0, 4), max_size=30))
def test_any_order_of_layers_gets_its_bytes(num_layers, wishes):
    fetcher = fetcher_of(num_layers)
    assert [len(slot) for slot in fetcher.slots] == [5 + num_layers - 1] * min(2, num_layers)
    for wish in wishes:
        layer = wish % num_layers
        assert fetcher.fetch(layer)[: 5 + layer].tolist() == [layer] * (5 + layer)
        assert fetcher.fetch(layer).data_ptr() == fetcher.fetch(layer).data_ptr()


@pytest.mark.parametrize("num_layers", [1, 2, 3, 6])
def test_in_training_every_layer_but_the_first_was_requested_before_it_was_needed(num_layers):
    fetcher = fetcher_of(num_layers)
    up = list(range(num_layers))
    for _ in range(3):
        for layer in up + up[::-1]:
            for _ in range(7):
                fetcher.fetch(layer)
    assert fetcher.num_fetches - fetcher.num_hits == 1
    assert fetcher.num_fetches == 1 + 6 * (num_layers - 1)


def test_in_evaluation_only_the_return_to_the_first_layer_is_not_foreseen():
    fetcher = fetcher_of(6)
    for _ in range(4):
        for layer in range(6):
            fetcher.fetch(layer)
    assert (fetcher.num_fetches, fetcher.num_hits) == (24, 20)


def test_a_fetched_layer_stays_while_it_is_used():
    fetcher = fetcher_of(4)
    for layer in (0, 1, 2, 3, 2, 1, 0, 3, 0, 2):
        held = fetcher.fetch(layer)
        assert (held[:5] == layer).all(), "fetching ahead must not touch the layer in use"


def test_tensors_of_a_layer_lie_end_to_end_without_padding():
    parts = {
        "a.codes": Part((3, 5), torch.int8),
        "a.scales": Part((3,), torch.float32),
        "b.codes": Part((7,), torch.uint8),
        "b.scales": Part((5,), torch.bfloat16),
        "c.weight": Part((3, 3), torch.bfloat16),
    }
    spans = lay_out(parts)
    buffer = host_buffer(spans, CPU)
    assert buffer.nbytes == 15 + 12 + 7 + 10 + 18
    values = {name: torch.full(part.shape, i + 1, dtype=part.dtype) for i, (name, part) in enumerate(parts.items())}
    for name, span in spans.items():
        span.of(buffer).copy_(values[name])
    for name, span in spans.items():
        assert torch.equal(span.of(buffer), values[name])
