"""Which entries occur in a caption: rules, tables, and the compiled loops over them.

Read ``rules.py`` first: what a match is. ``matcher.py`` builds, saves and applies the tables. ``match_kernels.py``
(windows of tokens in a hash table) and ``trie_kernels.py`` (entries without spaces around them) are compiled by numba.
"""
