"""From archives and captions to training shards. Each action of ``mc2 curate`` is a module of its name here.

Read ``match.py`` first. The way of the data is

    extract, deduplicate   archives to a pool of captions
    match                  captions to the entries in them; filters.py drops some before
    balance                counts of entries to thresholds and keep probabilities
    sample                 the rows that one epoch would train on
    pack, decontaminate    images and rows as training shards; without the images of benchmarks

and ``run`` is match, balance and pack in turn. A module makes a plan (``plan_match``), which ``mc2_hpc.jobs`` runs.
``explain.py`` follows one caption. ``matched.py`` and ``counts.py`` are the files between the stages; ``matching/``,
``pool/`` and ``report/`` know nothing of stages.
"""
