"""The search for similar codes is exact, groups are the connected components, and pHash codes find planted copies."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mc2_hpc.curation.copies import codes
from mc2_hpc.curation.copies.codes import VIEWS, view_codes
from mc2_hpc.curation.copies.linking import (
    ENTRY,
    collapse,
    collapse_crowded,
    join,
    link,
    links_of,
    new_forest,
    roots_of,
)
from mc2_hpc.curation.copies.tables import table_masks
from mc2_hpc.drops import Dropped
from tests.curation.planted import KINDS, copies_of, encoded, web_images


def entries_of(rng, num, num_images, spread):
    """Random entries in clusters: every code differs from one of a few centres in up to ``spread`` bits a word."""
    entries = np.zeros(num, ENTRY)
    centres = rng.integers(0, 1 << 64, (3, 4), dtype=np.uint64)
    entries["words"] = centres[rng.integers(0, 3, num)]
    for _ in range(spread):
        flips = np.uint64(1) << rng.integers(0, 64, (num, 4), dtype=np.uint64)
        entries["words"] ^= np.where(rng.random((num, 4)) < 0.7, flips, np.uint64(0))
    entries["image"] = rng.integers(0, num_images, num)
    entries["mirrored"] = rng.integers(0, 2, num)
    return entries


def naive_roots(entries, num_images, max_distance, max_check):
    """The first image of each group, by comparing all pairs."""
    roots = list(range(num_images))
    for one, other in combinations(entries.tolist(), 2):
        bits = [(a ^ b).bit_count() for a, b in zip(one[0], other[0], strict=True)]
        if bits[0] <= max_distance and sum(bits[1:]) <= max_check and not (one[2] and other[2]):
            low, high = sorted((roots[one[1]], roots[other[1]]))
            roots = [low if root == high else root for root in roots]
    return roots


def linked(entries, num_images, max_distance, max_check):
    forest = new_forest(num_images)
    for mask in table_masks(max_distance, len(entries)):
        link(entries, mask, forest, max_distance=max_distance, max_check=max_check)
    return roots_of(forest).tolist()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 12), st.integers(0, 12), st.integers(0, 40))
def test_groups_equal_those_of_all_pairs(seed, num, spread, max_distance, max_check):
    rng = np.random.default_rng(seed)
    entries = entries_of(rng, num, 40, spread)
    assert linked(entries, 40, max_distance, max_check) == naive_roots(entries, 40, max_distance, max_check)


@pytest.mark.parametrize("num_hashes", [10, 10**6, 10**9])
@pytest.mark.parametrize("radius", [0, 1, 4, 6, 10, 16])
def test_some_table_holds_both_hashes_of_every_pair_within_the_radius(radius, num_hashes):
    """However the bits that differ are placed: evenly, at one end, or at random."""
    masks = table_masks(radius, num_hashes)
    rng = np.random.default_rng(0)
    spans = [np.linspace(0, 63, radius).astype(int), np.arange(radius), 63 - np.arange(radius)]
    for bits in [*spans, *(rng.choice(64, radius, replace=False) for _ in range(200))]:
        differing = np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=np.uint64(0))
        assert ((masks & differing) == 0).any()
    assert len(masks) == len(set(masks.tolist()))
    num_bits = np.bitwise_count(masks)
    assert num_bits.max() - num_bits.min() <= len(masks) ** 0.5 and len(masks) <= comb(64, radius) + 1


def test_the_documented_numbers_of_tables():
    """docs/images.md multiplies with them."""
    documented = {(6, 10**6): (7, 9), (6, 10**9): (84, 21), (10, 10**6): (66, 10), (10, 10**9): (1001, 16)}
    for (radius, num_hashes), (num_tables, num_bits) in documented.items():
        masks = table_masks(radius, num_hashes)
        assert (len(masks), np.bitwise_count(masks).min()) == (num_tables, num_bits)


def test_a_million_hashes_of_which_few_are_near_each_other():
    """At this size, buckets are larger than one, and the tables others than for small sets."""
    rng = np.random.default_rng(1)
    entries = np.zeros(1_000_000, ENTRY)
    entries["words"][:, 0] = rng.integers(0, 1 << 64, len(entries), dtype=np.uint64)
    entries["image"] = np.arange(len(entries))
    near = rng.choice(500_000, 300, replace=False)
    for copy, original in enumerate(near):
        flips = rng.choice(64, copy % 7, replace=False).astype(np.uint64)
        flipped = np.bitwise_or.reduce(np.uint64(1) << flips, initial=np.uint64(0))
        entries["words"][500_000 + copy, 0] = entries["words"][original, 0] ^ flipped
    forest = new_forest(len(entries))
    for mask in table_masks(5, len(entries)):
        link(entries, mask, forest, max_distance=5, max_check=192)
    found = {tuple(pair) for pair in links_of(forest).tolist()}
    assert found == {(500_000 + copy, original) for copy, original in enumerate(near.tolist()) if copy % 7 <= 5}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 80))
def test_equal_codes_are_collapsed_without_changing_groups(seed, num):
    rng = np.random.default_rng(seed)
    entries = entries_of(rng, num, 40, 2)
    entries = entries[rng.integers(0, max(1, num // 3), num)] if num else entries
    entries["image"] = rng.integers(0, 40, num)
    entries["mirrored"] = 0
    forest = new_forest(40)
    distinct = collapse(entries, forest)
    assert len(np.unique(distinct[["words", "mirrored"]])) == len(distinct)
    for mask in table_masks(4, max(1, len(distinct))):
        link(distinct, mask, forest, max_distance=4, max_check=12)
    assert roots_of(forest).tolist() == naive_roots(entries, 40, 4, 12)


def test_a_placeholder_that_occurs_often_costs_no_more_than_other_images():
    """Without collapsing, this takes hours."""
    entries = np.zeros(1_000_000, ENTRY)
    entries["image"] = np.arange(len(entries))
    forest = new_forest(len(entries))
    distinct = collapse(entries, forest)
    assert len(distinct) == 1 and not roots_of(forest).any()


def test_only_crowded_buckets_are_collapsed():
    """The codes of a placeholder, and of a second one that differs in a bit, become one each; other copies stay."""
    rng = np.random.default_rng(4)
    entries = np.zeros(50_000, ENTRY)
    entries["words"] = rng.integers(0, 1 << 64, (50_000, 4), dtype=np.uint64)
    entries["image"] = np.arange(50_000)
    entries["words"][10_000:30_000] = entries["words"][1]
    entries["words"][10_001:30_000:2, 3] ^= np.uint64(1)
    entries["words"][40_000] = entries["words"][2]
    expected = new_forest(50_000)
    for mask in table_masks(6, 50_000):
        link(collapse(entries, expected), mask, expected, max_distance=6, max_check=192)
    found = new_forest(50_000)
    for mask in table_masks(6, 50_000):
        kept = collapse_crowded(entries, mask, found)
        assert len(kept) <= 30_001 and {2, 40_000} <= set(kept["image"].tolist())
        link(kept, mask, found, max_distance=6, max_check=192)
    assert roots_of(found).tolist() == roots_of(expected).tolist()
    assert roots_of(found)[40_000] == 2 and (roots_of(found)[10_000:30_000] == 1).all()


def test_links_of_parts_join_to_the_groups_of_the_whole():
    rng = np.random.default_rng(3)
    entries = entries_of(rng, 60, 40, 6)
    masks = table_masks(8, 60)
    whole = new_forest(40)
    for part in range(3):
        forest = new_forest(40)
        for mask in masks[part::3]:
            link(entries, mask, forest, max_distance=8, max_check=40)
        join(whole, links_of(forest))
    assert roots_of(whole).tolist() == naive_roots(entries, 40, 8, 40)


def distances(one, other):
    """Bits between the whole view of one image and the nearest code of another: of the hash, and of the check."""
    bits = np.bitwise_count(one["words"][:, None] ^ other["words"][None]).astype(int)
    return bits[0, :, 0].min(), bits[0, :, 1:].sum(-1).min()


def test_the_hash_of_the_whole_view_is_phash(shared_data):
    imagehash = pytest.importorskip("imagehash", reason="imagehash is not installed")
    for data in web_images(shared_data).values():
        expected = np.packbits(imagehash.phash(codes.decode_grey(data)).hash).view(">u8")[0]
        assert np.bitwise_count(view_codes(data)["words"][0, 0] ^ expected) <= 4  # it is shrunk in two steps


def test_codes_of_the_mirror_image_are_the_mirrored_codes(shared_data):
    """The mirror image of an image without loss has them exactly, up to frequencies at the median."""
    data = next(iter(web_images(shared_data).values()))
    image = Image.fromarray(np.asarray(codes.decode_grey(data).resize((128, 128))))
    one, other = (view_codes(encoded(view, form="PNG")) for view in (image, image.transpose(Image.FLIP_LEFT_RIGHT)))
    assert len(one) == 2 * len(VIEWS) and one["mirrored"].tolist() == [0] * len(VIEWS) + [1] * len(VIEWS)
    assert np.bitwise_count(one["words"][0] ^ other["words"][len(VIEWS)]).sum() <= 4
    assert np.bitwise_count(one["words"][0] ^ other["words"][0]).sum() > 60


@pytest.mark.parametrize("kind", KINDS)
def test_some_code_of_a_copy_is_near_and_none_of_another_image(shared_data, kind):
    images = dict(list(web_images(shared_data).items())[:8])
    originals = {key: view_codes(data) for key, data in images.items()}
    for (key, _), data in copies_of(images, kinds={kind: KINDS[kind]}).items():
        copied = view_codes(data)
        for other, original in originals.items():
            bits = np.bitwise_count(copied["words"][:, None] ^ original["words"][None]).astype(int)
            near = (bits[:, :, 0] <= 6) & (bits[:, :, 1:].sum(-1) <= 40)
            assert near.any() == (key == other)


def test_images_of_one_colour_are_copies_of_each_other_only():
    red, also_red, blue = (
        view_codes(encoded(Image.new("RGB", size, colour), form="PNG"))
        for size, colour in (((64, 64), (200, 20, 20)), ((9, 5), (201, 21, 21)), ((64, 64), (20, 20, 200)))
    )
    assert len(red) == 1 and np.array_equal(red["words"], also_red["words"])
    assert np.bitwise_count(red["words"] ^ blue["words"]).min() > 10


def test_undecodable_images_are_named_by_reason():
    for data, reason in ((b"", "image_undecodable"), (encoded(Image.new("L", (99, 99)))[:300], "image_truncated")):
        with pytest.raises(Dropped, match=reason):
            view_codes(data)
    with pytest.raises(Dropped, match="image_too_large"):
        view_codes(encoded(Image.new("L", (99, 99)), form="PNG"), max_pixels=99)
