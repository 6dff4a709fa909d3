"""A policy as body and head, its forward passes over rollouts, and frozen copies of it."""
