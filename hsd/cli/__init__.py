"""The command line: a module a command, listed in ``__main__.py``."""
