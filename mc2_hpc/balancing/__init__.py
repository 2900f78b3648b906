"""Balancing, shared by curation and the loader: thresholds, keep probabilities, and the rows that an epoch trains on.

Read ``thresholds.py`` first: the recipe's rule, arrays only. ``selection.py`` draws an epoch's rows, ``folder.py``
reads the output of ``mc2 curate balance``, and ``csr.py`` implements ragged rows.
"""
