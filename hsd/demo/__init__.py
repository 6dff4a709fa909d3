"""The two worlds of the demo: model, data and verifier of each."""
