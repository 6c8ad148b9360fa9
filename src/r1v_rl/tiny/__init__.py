"""Tiny parts for a CPU: tokenizer, text lessons, and the training of encoder and language models."""
