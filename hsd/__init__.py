"""Hindsight Self-Distillation: a thin trainer on top of TRL."""
