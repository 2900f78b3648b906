"""Judging samples by filters of captions and of images; ``mc2_hpc.curation.filter`` is the stage.

``images.py`` has what filters of images receive and implement, ``judge.py`` applies filters to the rows of a shard,
``verdicts.py`` has the table that records the outcome. The filters themselves are in :mod:`mc2_hpc.filters`.
"""
