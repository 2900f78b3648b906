"""Reading the sources of captions and images; there are no stages here.

Start with ``captions.py``: a pool and its usable rows. ``common_crawl.py``, ``page_images.py`` and ``urls.py`` read a
crawl's archives; ``language_id.py`` identifies languages; ``image_tars.py`` and ``perceptual_hash.py`` handle images;
``distinct.py`` finds which strings are new.
"""
