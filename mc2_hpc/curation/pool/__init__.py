"""Reading what captions and images come from: no stages here.

Read ``captions.py`` first: a pool and its usable rows. ``common_crawl.py``, ``page_images.py`` and ``urls.py`` read a
crawl's archives; ``language_id.py`` tells languages; ``image_tars.py`` and ``perceptual_hash.py`` look at images;
``distinct.py`` tells which strings are new.
"""
