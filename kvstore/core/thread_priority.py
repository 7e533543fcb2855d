"""Work that nobody waits for gives way to the work of those who wait: the priority of background threads.

Everything that differs between systems is here. Linux has a niceness for each thread, macOS a quality of service.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from contextlib import suppress

# About a tenth of a core where others want all of them, and all that is left over where they do not.
BACKGROUND_NICE = 10
# <sys/qos.h>: QOS_CLASS_UTILITY, for work of which the user sees the end only. BACKGROUND, below it, would be held to
# the efficiency cores and a throttled disk even on an idle machine.
_QOS_CLASS_UTILITY = 0x11


def lower_thread_priority() -> None:
    """Lower the priority of the calling thread, for good: raising it again takes privileges.

    Linux: niceness, unless it is higher already. macOS: the quality of service class "utility", which has not been run
    there yet. Where the system refuses, or is another, the thread stays as it is.
    """
    with suppress(OSError, AttributeError):
        if sys.platform == "linux":
            thread = threading.get_native_id()
            nice = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, max(nice, BACKGROUND_NICE))
        elif sys.platform == "darwin":
            ctypes.CDLL(None).pthread_set_qos_class_self_np(ctypes.c_uint(_QOS_CLASS_UTILITY), ctypes.c_int(0))
