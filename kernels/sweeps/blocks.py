"""Which worlds a block holds, and which policy drives them.

An ensemble of K policies simulates K * member_worlds worlds in one launch, member after member. The worlds of
a block share every weight that is loaded, so no block reaches into another member: the last block of each may
be short. With one policy, member_worlds is the number of all worlds.
"""

import warp as wp

from ..policy.layout import BLOCK


@wp.func
def block_worlds(block: int, member_worlds: int):
    """(member, first world, worlds that exist) of a block."""
    member_blocks = (member_worlds + wp.static(BLOCK - 1)) / wp.static(BLOCK)
    member = block / member_blocks
    first = (block - member * member_blocks) * wp.static(BLOCK)
    return member, member * member_worlds + first, wp.min(wp.static(BLOCK), member_worlds - first)


@wp.func
def group_worlds(group: int, together: int, member_worlds: int):
    """(member, first block, first world, worlds that exist) of a group of so many blocks of a member."""
    member_blocks = (member_worlds + wp.static(BLOCK - 1)) / wp.static(BLOCK)
    member_groups = (member_blocks + together - 1) / together
    member = group / member_groups
    block = (group - member * member_groups) * together
    first = block * wp.static(BLOCK)
    worlds = wp.min(together * wp.static(BLOCK), member_worlds - first)
    return member, member * member_blocks + block, member * member_worlds + first, worlds
