"""What a run of curation did, as one page: ``findings.py`` gathers it (read this first), ``plots.py`` draws, ``page.py``
writes the HTML."""
