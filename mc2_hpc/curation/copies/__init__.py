"""Copies of images: codes by which they are recognised, and the search for pairs and groups of them.

    codes        what a code is; pHash codes of an image's views       features     codes of an encoder's features
    tables       how a radius search becomes exact look-ups            linking      the search, compiled; groups

``mc2_hpc.curation.dedup_images`` and ``mc2_hpc.curation.decontaminate`` run it on shards.
"""
