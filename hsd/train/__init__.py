"""The update, the trainer on TRL, and what watches a run."""
