"""Which entries occur in a caption: the rules, the tables, and the compiled loops over them.

Start with ``rules.py``, which defines a match. ``matcher.py`` builds, saves and applies the tables.
``match_kernels.py`` (windows of tokens in a hash table) and ``trie_kernels.py`` (entries without spaces around them)
are compiled by numba.
"""
