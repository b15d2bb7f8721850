"""Runs a command with shared memory that only its own user can open, and large stacks: ``own_memory.py COMMAND ...``.

Triton's Python backend keeps prompts and answers in ``/dev/shm``. Boost makes those files and then calls
``fchmod(file, 0644)``, whatever the umask. So the command gets a umask of 077 and a seccomp filter (seccomp(2),
kernel 3.17 or later) under which exactly that call does nothing, in it and in all that it starts.

Its HTTP port (2.51) keeps a JSON body on a thread's stack, about twice, and follows nested brackets there: with the
usual 8 MiB a prompt of 4.2 MB is a SIGSEGV. A thread gets the soft limit of the stack; what it does not use is free.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

STACK_BYTES = 128 << 20
_BOOSTS_MODE = 0o644
_NO_NEW_PRIVS, _SET_MODE_FILTER, _SPEC_ALLOW = 38, 1, 4
_ALLOW, _RETURN_ZERO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_MACHINES = {  # (AUDIT_ARCH, numbers of the calls seccomp and fchmod)
    "x86_64": (0xC000003E, 317, 91),
    "aarch64": (0xC00000B7, 277, 52),
}


def _filter(arch: int, fchmod: int) -> bytes:
    """The filter as classic BPF over ``struct seccomp_data``: number at 0, architecture at 4, second argument at 24."""
    program = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 0, 5, arch),
        (_LOAD, 0, 0, 0),
        (_EQUAL, 0, 3, fchmod),
        (_LOAD, 0, 0, 24),
        (_EQUAL, 0, 1, _BOOSTS_MODE),
        (_RETURN, 0, 0, _RETURN_ZERO),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def restrict() -> None:
    """Restricts this process and its children to come.

    Raises:
        OSError: this kernel, or whoever runs this container, does not allow filters.
    """
    os.umask(0o077)
    arch, seccomp, fchmod = _MACHINES[platform.machine()]
    code = ctypes.create_string_buffer(_filter(arch, fchmod))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(seccomp, _SET_MODE_FILTER, _SPEC_ALLOW, program):
        raise OSError(ctypes.get_errno(), "seccomp(2) failed")


def enlarge_stacks() -> None:
    """Of this process and its children to come, as far as the hard limit allows."""
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    soft = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


if __name__ == "__main__":
    enlarge_stacks()
    try:
        restrict()
    except (OSError, KeyError) as error:
        sys.exit(f"shared memory that others cannot read is not to be had on this machine: {error}")
    os.execvp(sys.argv[1], sys.argv[1:])
