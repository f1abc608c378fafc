"""What of this folder is no page of doctests.

Pages whose blocks need another library are executed by `tests/test_migrating.py`, which knows which they are.
"""

collect_ignore = ["_build", "conf.py", "look.py"]
collect_ignore_glob = ["migrating_*.md"]
