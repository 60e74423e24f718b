"""Workers of a server, as reported by the kernel."""

from pathlib import Path

from support.waiting import wait_until

_ESTABLISHED = "01"


def workers_of(pid: int) -> list[int]:
    """Returns the ids of the live children of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if lives(int(child))]


def lives(pid: int) -> bool:
    """Returns True if a process has a live thread, and so keeps its sockets open."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        # The main thread may have ended before the others.
        return state != "Z" or len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(*pids: int) -> None:
    """Waits for the end of processes that are not our children."""
    wait_until(lambda: not any(map(lives, pids)), lambda: f"still there: {[pid for pid in pids if lives(pid)]}")


def connections_of(pid: int, port: int) -> int:
    """Returns the number of TCP connections of a process to `port`, over IPv4 and IPv6."""
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
