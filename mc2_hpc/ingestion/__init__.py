"""A user's own images and captions as training shards: what ``mc2 data pack`` does.

Start with ``pack.py``, the stage that writes shards. ``source.py`` recognises what a source is; ``folder.py``,
``table.py``, ``webdataset.py`` and ``rows.py`` read one kind each, as the samples that ``samples.py`` checks and
writes.
"""
