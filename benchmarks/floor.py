"""The copy floor: one process that reads every input once and writes the output once.

python benchmarks/floor.py OUT OUT_BYTES INPUT...
"""

import os
import sys

BLOCK = 4 * 2**20


def main() -> None:
    out, size, inputs = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    buffer = bytearray(BLOCK)
    for path in inputs:
        fd = os.open(path, os.O_RDONLY)
        while os.readv(fd, [buffer]):
            pass
        os.close(fd)
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    view = memoryview(buffer)
    while size > 0:
        size -= os.write(fd, view[: min(BLOCK, size)])
    if os.environ.get("FLUSH"):
        os.fsync(fd)
    os.close(fd)


if __name__ == "__main__":
    main()
