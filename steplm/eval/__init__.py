"""What a finished model is worth: perplexity on text, and samples."""
