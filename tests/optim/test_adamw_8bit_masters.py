# For tests/optim/test_low_memory.py; `masters_of` is that of tests/optim/test_matrix.py.
@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_bytes_with_8_bit_masters_are_those_of_the_formulas(states):
    named = parameters()
    optimizer = AdamW(named, states=states, master_weights="8bit")
    assert all(held["correction"].nbytes == named[name].numel() for name, held in optimizer.state_tensors().items())
    set_gradients(named, 0)
    with ByteCounter() as counter:
        optimizer.step(1e-2, grad_scale=0.5)
    buckets = [[named[name].numel() for name in named if named[name].ndim == n] for n in (1, 2)]
    expected = max(step_bytes(sum(b), max(b), states=states, masters="8bit") for b in buckets)
    assert expected <= counter.peak_bytes <= expected + 4 * len(named)  # the counts of steps


def test_over_a_thousand_steps_8_bit_masters_stay_with_fp32_ones_where_bf16_alone_does_not():
    def final(master_weights):
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(16, 24, generator=generator)
        weight = nn.Parameter(torch.randn(16, 24, generator=generator).bfloat16())
        optimizer = AdamW({"w": weight}, master_weights=master_weights)
        torch.manual_seed(0)

        def held():
            states = optimizer.state_tensors()["w"]
            if "correction" in states:
                return correct(weight.detach(), states["correction"])
            return states.get("master", weight.detach()).float()

        for step in range(1000):
            inputs = torch.randn(32, 24, generator=generator)
            weight.grad = ((inputs @ (held() - target).T).T @ inputs / 32).bfloat16()
            optimizer.step(1e-2 * (1 - step / 1000))
        return held()

    exact = final(True)
    kept, alone = ((final(masters) - exact).square().mean().sqrt() for masters in ("8bit", False))
    assert kept < 3e-4 < 3e-3 < alone
