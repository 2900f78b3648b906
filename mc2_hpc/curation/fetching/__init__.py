"""Fetching images from the addresses in a pool; ``mc2_hpc.curation.fetch`` is the stage.

``fetcher.py`` is the loop over a shard's keys, ``client.py`` one request, ``ledger.py`` what has been done so far.
``addresses.py`` and ``robots.py`` decide what may be fetched, ``hosts.py`` when, ``stored.py`` which bytes are kept;
``options.py`` has the limits.
"""
