"""From archives and captions to training shards. Each action of ``mc2 curate`` has a module of the same name here.

Start with ``match.py``. The stages, in order:

    extract, deduplicate   archives to a pool of captions
    fetch                  the images at the pool's addresses
    dedup_images           one of the images that are copies of each other
    match                  captions to the entries in them; filters.py drops some first
    balance                entry counts to thresholds and keep probabilities
    sample                 the rows that one epoch would train on
    pack, decontaminate    images and rows as training shards; minus the images of benchmarks

``run`` is match, balance and pack in turn. A module makes a plan (``plan_match``), which ``mc2_hpc.jobs`` runs.
``explain.py`` traces one caption. ``matched.py`` and ``counts.py`` define the files between the stages; ``copies/``,
``fetching/``, ``matching/``, ``pool/`` and ``report/`` do not depend on stages.
"""
