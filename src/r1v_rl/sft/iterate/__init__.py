"""Iterative fine-tuning: rounds of answering, judging, scoring, selecting and training."""
