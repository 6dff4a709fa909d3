"""Scripts that run as child processes of the verifiers, by path; nothing here is imported."""
