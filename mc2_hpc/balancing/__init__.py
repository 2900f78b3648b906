"""What curation and the loader share: thresholds, keep probabilities, and the rows that an epoch trains on.

Read ``thresholds.py`` first: the recipe's rule, arrays only. ``selection.py`` draws an epoch's rows, ``folder.py``
reads what ``mc2 curate balance`` left, and ``csr.py`` holds ragged rows.
"""
