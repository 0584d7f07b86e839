"""MT-Bench: two-turn questions, answers from our models, and a judge behind an OpenAI-compatible endpoint.

Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv 2306.05685). Questions,
references, judge prompts, answers and judgments are files in FastChat's formats; this package ships none of them.
"""
