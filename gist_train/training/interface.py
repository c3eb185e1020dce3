"""By which network interface gloo speaks to other hosts: it asks for the address of this host's name, often that of loopback."""

import fcntl
import socket
import struct
from collections.abc import Mapping

from gist_train.config.errors import Fault, UserError

_ADDRESS = 0x8915
"""SIOCGIFADDR of Linux."""
SETTING = "GLOO_SOCKET_IFNAME"


def interface_to_others(environment: Mapping[str, str]) -> str | None:
    """The interface that leads to the first rank, where several hosts train and gloo would choose loopback; None elsewhere.

    Args:
        environment: of this process, which a launcher has set.

    Raises:
        UserError: there is none to be found.
    """
    alone = environment.get("LOCAL_WORLD_SIZE", "1") == environment.get("WORLD_SIZE", "1")
    if alone or SETTING in environment or not _is_loopback(socket.gethostname()):
        return None
    first = environment.get("MASTER_ADDR", "")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((first, 9))  # sends nothing: it asks for the route
            own = probe.getsockname()[0]
    except OSError:
        own = ""
    named = [name for _, name in socket.if_nameindex() if _address(name) == own]
    if not named or own.startswith("127."):
        found = f'"{socket.gethostname()}", the name of this host, which resolves to loopback, and no way to MASTER_ADDR {first}'
        fix = f"set {SETTING} (and NCCL_SOCKET_IFNAME on GPUs) to the interface that leads to the others, e.g. eth0"
        raise UserError(Fault(SETTING, found, "the network interface that leads to the other hosts", fix))
    return named[0]


def _address(interface: str) -> str | None:
    """Its IPv4 address, None for none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking, _ADDRESS, struct.pack("256s", interface.encode()))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def _is_loopback(name: str) -> bool:
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:  # a name that nobody knows is none that gloo can use either
        return True
