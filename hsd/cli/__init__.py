"""The command line: ``hsd train``, ``eval``, ``credit``, ``compare``, ``data``, ``doctor`` and ``demo``."""
