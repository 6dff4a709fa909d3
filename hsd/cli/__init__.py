"""The command line: ``hsd train``, ``hsd eval``, ``hsd credit``, ``hsd compare``, ``hsd data``, ``hsd doctor``."""
