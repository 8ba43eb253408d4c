"""Which errors of a file system say that a checkpoint is damaged.

A file that is missing was there when the checkpoint was committed. Anything else, a server that is
away, a permission, a limit, says nothing of the bytes: to set a checkpoint aside for that would
throw away what was trained since the one before.
"""

import errno
from typing import Final

_DAMAGE: Final = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def is_damage(error: OSError) -> bool:
    """Whether the file is not what was written, rather than out of reach for now."""
    # None or 0: not the system's own, but of somebody who found the file too short.
    return not error.errno or error.errno in _DAMAGE
