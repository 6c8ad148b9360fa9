"""Supervised stages: projector alignment and fine-tuning."""
