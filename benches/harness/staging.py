"""What is read while something is measured, copied to memory, so that no file system of the host is part of it."""

import os
import shutil
import tempfile

DISK_BYTES = 64 << 20


class Files:
    """A folder in memory with the program, files of the guest and an empty disk. Gives its path; removed on leaving the `with`."""

    def __init__(self, options, names):
        self.path = tempfile.mkdtemp(prefix="rackvisor-bench-files.", dir="/dev/shm")
        for name in names:
            shutil.copy(os.path.join(options.guest, name), self.path)
        shutil.copy(options.rackvisor, os.path.join(self.path, "rackvisor"))
        with open(os.path.join(self.path, "disk"), "wb") as disk:
            disk.truncate(DISK_BYTES)

    def __enter__(self):
        return self.path

    def __exit__(self, *_):
        shutil.rmtree(self.path)
