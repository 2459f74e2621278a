"""A contender of `benchmarks.side_by_side` that trains nothing: `-m tests.side_by_side_contender`.

It prints what it should not, has a worker, and does as --behave says.
"""

import argparse
import mmap
import os
import sys
import time

from benchmarks.contender import claim_protocol, contender_arguments, serve

SHARED_MB, OWN_MB, WORKER_SECONDS = 64, 32, 0.05


def start_worker(shared: mmap.mmap) -> tuple[int, int]:
    """A worker that holds memory of its own beside what it shares, and does not end by itself.

    Returns:
        Where to write for a piece of work, and where to read that it is done.
    """
    for _ in range(SHARED_MB):
        shared.write(b"s" * 1024 * 1024)
    (wanted, want), (finished, finish) = os.pipe(), os.pipe()
    if os.fork() == 0:
        shared.seek(0)
        own = shared.read(OWN_MB * 1024 * 1024)
        assert all(shared.read(1024 * 1024) for _ in range(SHARED_MB - OWN_MB))
        while os.read(wanted, 1):
            start = time.process_time()
            while time.process_time() - start < WORKER_SECONDS:
                pass
            os.write(finish, own[:1])
    return want, finished


def main(options: argparse.Namespace) -> None:
    claim_protocol()
    print("printed by a library")
    print('{"steps": 7, "images": 7}')
    if options.behave == "fail":
        sys.exit("the network is not there")
    shared = mmap.mmap(-1, SHARED_MB * 1024 * 1024)
    want, finished = start_worker(shared)
    steps = 0

    def step() -> tuple[int, float]:
        nonlocal steps
        steps += 1
        print("printed in a step")
        assert sys.stdin.read() == ""
        os.write(want, b"w")
        os.read(finished, 1)
        if options.behave == "hang" and steps > 3:
            time.sleep(600)
        return options.batch, 1 / steps

    serve(step, "test", {"prefetched": 2, "shared": len(shared)})


if __name__ == "__main__":
    parser = contender_arguments(__doc__)
    parser.add_argument("--behave", default="well")
    main(parser.parse_args())
