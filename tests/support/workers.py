"""What the kernel knows of a server's workers."""

from pathlib import Path

from support.waiting import wait_until

_ESTABLISHED = "01"


def workers_of(pid: int) -> list[int]:
    """Process ids of the live children of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if lives(int(child))]


def lives(pid: int) -> bool:
    """Whether a process has a thread that runs, and so keeps its sockets open; whether it was waited for or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        # The first thread can have ended before the others.
        return state != "Z" or len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(*pids: int) -> None:
    """Waits for the end of processes that are not ours to wait for."""
    wait_until(lambda: not any(map(lives, pids)), lambda: f"still there: {[pid for pid in pids if lives(pid)]}")


def connections_of(pid: int, port: int) -> int:
    """How many TCP connections to `port`, over IPv4 or IPv6, a process holds."""
    inodes = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(file.readlink())
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    lines = [
        line for table in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    fields = [line.split() for line in lines]
    return sum(
        row[9] in inodes and row[3] == _ESTABLISHED and int(row[1].rpartition(":")[2], 16) == port for row in fields
    )
