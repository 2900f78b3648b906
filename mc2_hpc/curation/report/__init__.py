"""What a run of curation did, on one page.

Read ``findings.py`` first, which gathers it; ``plots.py`` draws, ``page.py`` writes the HTML.
"""
