"""Makes a process group for checkpoints alone, so that a save can run beside the collectives of the training loop."""

from weakref import WeakKeyDictionary

import torch.distributed as dist

from mmoe.compat import group_timeout
from mmoe.runtime.agreement import ProcessGroupRanks

# By default group, and gone with it: a process may leave its group and join another.
_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def checkpoint_ranks() -> ProcessGroupRanks:
    """Return the ranks that save and load together: all of them, over a gloo group that nothing else sends in.

    All ranks call this, on the thread that makes groups and in the same order as collectives of the default group: the
    first call for a default group makes the group, with that one's timeout. It is not made with a manager, since one
    process alone may make a manager, to list steps or to read a text. `dist.destroy_process_group` ends it with all
    others. Without a process group it is this process.
    """
    if not dist.is_initialized():
        return ProcessGroupRanks()
    world = dist.group.WORLD
    assert world is not None  # as it is initialized
    if world not in _groups:
        group = dist.new_group(backend="gloo", timeout=group_timeout(world), group_desc="checkpoint")
        assert isinstance(group, dist.ProcessGroup)  # as every rank is a member
        _groups[world] = group
    return ProcessGroupRanks(_groups[world])
