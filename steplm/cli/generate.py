"""``steplm generate``."""

from __future__ import annotations

from steplm.cli.model_paths import find_model


def run_generate(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Print the prompt and its continuation."""
    found = find_model(model)
    from steplm.eval.generate import generate

    continuation = generate(
        found,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        device=device,
    )
    print(prompt + continuation)
