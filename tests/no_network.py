"""Become a command in a network namespace of its own: loopback is up, and there is nothing else.

python tests/no_network.py COMMAND ARGUMENT…
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

# From the kernel's sched.h, sockios.h and if.h.
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


def main() -> None:
    user, group = os.geteuid(), os.getegid()
    # Only root may make a network namespace; others are root in a user namespace of their own.
    flags = CLONE_NEWNET if user == 0 else CLONE_NEWNET | CLONE_NEWUSER
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        sys.exit(f"no network namespace here: {os.strerror(ctypes.get_errno())}")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
