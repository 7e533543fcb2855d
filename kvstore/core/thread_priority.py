"""Lowers the priority of background threads, so that they do not slow down work that a caller waits for.

All platform differences are in this module. Linux has a niceness per thread, macOS a quality-of-service class.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from contextlib import suppress

# At this niceness a thread gets about a tenth of a core on a busy machine, and all idle time otherwise.
BACKGROUND_NICE = 10
# <sys/qos.h>: QOS_CLASS_UTILITY, for work whose progress the user does not watch. The next lower class, BACKGROUND,
# is restricted to the efficiency cores and throttled disk I/O even on an idle machine.
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
