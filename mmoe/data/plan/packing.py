"""Pack one window of documents into sequences by best fit, under two capacities."""

import numpy as np


def best_fit(lengths: np.ndarray, patches: np.ndarray, capacity: int, patch_capacity: int) -> np.ndarray:
    """Pack items into bins of `capacity` positions and `patch_capacity` patches: best fit, longest first.

    `lengths`, `patches` are [n] integers; every item must fit an empty bin on its own (ValueError names the first
    that does not). Returns the bin of each item, i64 [n]; bins are numbered in the order in which they were opened.

    Open bins are kept in stacks by remaining positions, and an integer's bits mark which stacks are not empty,
    so that the tightest bin is one shift and one lowest-bit look-up, whatever the number of open bins.
    """
    over = np.flatnonzero((lengths > capacity) | (patches > patch_capacity))
    if over.size:
        item = int(over[0])
        raise ValueError(
            f"item {item} has {lengths[item]} positions and {patches[item]} patches; "
            f"a sequence holds {capacity} and {patch_capacity}"
        )
    order = np.argsort(-lengths, kind="stable")
    chosen: list[int] = []  # of the items in this order
    patch_room: list[int] = []
    stacks: dict[int, list[int]] = {}
    occupied = 0
    for size, need in zip(lengths[order].tolist(), patches[order].tolist()):
        room = size
        candidates = occupied >> size
        while candidates:
            step = (candidates & -candidates).bit_length() - 1
            room += step
            stack = stacks[room]
            # Newest first: it is the least full in patches among bins with equal room, as items shrink.
            at = len(stack) - 1
            while at >= 0 and patch_room[stack[at]] < need:
                at -= 1
            if at >= 0:
                number = stack.pop(at)
                if not stack:
                    occupied ^= 1 << room
                patch_room[number] -= need
                break
            candidates >>= step + 1
            room += 1
        else:
            number, room = len(patch_room), capacity
            patch_room.append(patch_capacity - need)
        chosen.append(number)
        room -= size
        if room:
            if room in stacks:
                stacks[room].append(number)
            else:
                stacks[room] = [number]
            occupied |= 1 << room
    bins = np.empty(len(order), np.int64)
    bins[order] = chosen
    return bins
