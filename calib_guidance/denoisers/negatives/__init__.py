"""Negatives: what stands for the unconditional prediction."""
