"""The watcher of a repository."""

from pathlib import Path

from support import bundles
from support.repositories import serving


async def test_new_versions_are_found_by_polling(root: Path, exported: list[Path]) -> None:
    async with serving(root, poll=0.01) as served:
        for version in (2, 3):
            served.changed.clear()
            bundles.publish(exported[1], root, "m", version)
            await served.changed.wait()
            assert served.names[-1] == f"m/{version}"
