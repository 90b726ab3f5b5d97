"""What does the C library do with memory that is freed?"""

import ctypes
import platform

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next allocation, and return whether it will.

    glibc returns blocks above 32 MB to the system at once and takes new ones page by page, which costs about 5 % of a
    training step's processor time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False

    library = ctypes.CDLL(None)
    return all(library.mallopt(parameter, _LARGEST) == 1 for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
