"""The credit page and the figures of a credit measurement."""
