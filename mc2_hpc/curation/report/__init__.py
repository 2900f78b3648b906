"""What a curation run did, on one page.

Start with ``findings.py``, which gathers the data; ``plots.py`` draws, ``page.py`` writes the HTML.
"""
