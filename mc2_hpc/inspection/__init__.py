"""Looking into training shards: ``mc2 data lint`` and ``mc2 data show``.

``shard.py`` reads a shard as the loader does; ``lint.py`` adds up what it finds; ``page.py`` shows it with pictures;
``show.py`` finds single samples.
"""
