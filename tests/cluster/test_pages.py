"""Memory that is handed out again."""

from __future__ import annotations

import numpy as np
from cluster.small_clusters import cluster, decode, prefill, requests, simulator

from biscale_gym.cluster.pages import Blocks, on_large_pages

PAGE_BYTES = 2 << 20


def test_blocks_begin_at_a_page_and_hold_what_is_asked_for() -> None:
    for count in (1, PAGE_BYTES, 3 * PAGE_BYTES + 7):
        for block in (on_large_pages(count), Blocks().take(count)):
            assert len(block) == count
            assert block.ctypes.data % PAGE_BYTES == 0
            block[:] = 1


def test_a_block_is_handed_out_again_when_no_array_is_left_of_it() -> None:
    blocks = Blocks()
    first = blocks.take(1000)
    where = first.ctypes.data
    part = first[100:900].view(np.float64)[1:]
    second = blocks.take(1000)
    assert second.ctypes.data != where
    del first
    assert blocks.take(1000).ctypes.data != where  # a part of it is still read
    del part
    assert blocks.take(1000).ctypes.data == where
    assert blocks.take(1001).ctypes.data == where  # a little more than the first asked for
    assert blocks.take(PAGE_BYTES << 3).ctypes.data != where  # and far too much


def test_simulators_that_follow_one_another_use_the_same_memory_and_none_that_is_read() -> None:
    trace = requests(np.arange(60) * 0.02, [50] * 60, [3] * 60)
    blank = simulator([prefill(), decode()], trace, cluster(), seed=3)
    kept = blank.anew(trace, 3)
    kept.run()
    finish_s = kept.requests().finish_s
    where = []
    for _ in range(3):
        later = blank.anew(trace, 3)
        where.append(later.state.req.ctypes.data)
        later.run()
        np.testing.assert_array_equal(later.requests().finish_s, finish_s)
        del later
    assert len(set(where)) == 1
    assert where[0] != kept.state.req.ctypes.data
