"""From archives and captions to training shards. Each action of ``mc2 curate`` is a module with its name here.

Read ``match.py`` first; the way of a caption is

    extract  deduplicate ->  match  ->  balance  ->  sample       ->  pack  ->  decontaminate
    archives, pools          entries    thresholds   one epoch's rows  images and rows   benchmarks out

and ``run`` is match, balance and pack in turn. A module makes a plan (``plan_match`` ...), which ``mc2_hpc.jobs`` runs.
``filters.py`` drops captions before matching, ``explain.py`` follows one caption. ``matched.py`` and ``counts.py`` are the
files between the stages; ``matching/``, ``pool/`` and ``report/`` know nothing of stages.
"""
