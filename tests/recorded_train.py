"""`trainer.train` that writes down every batch's sample ids: `-m tests.recorded_train FOLDER …`.

One line a batch in FOLDER/rank-N.jsonl: number of the global batch, world size, ids, so that a test
can compare what runs on other ranks saw.
"""

import json
import os
import sys
from pathlib import Path

from data_pipeline.batch import Batch
from data_pipeline.loader import BatchStream
from trainer.train import main

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    plain_init, plain_next = BatchStream.__init__, BatchStream.__next__

    def init(stream: BatchStream, *arguments: object, **more: object) -> None:
        stream.number = more["start"]  # type: ignore[attr-defined]
        plain_init(stream, *arguments, **more)  # type: ignore[arg-type]

    def recorded(stream: BatchStream) -> Batch:
        batch = plain_next(stream)
        row = [stream.number, world_size, rank, batch.sample_id.tolist()]  # type: ignore[attr-defined]
        with (folder / f"rank-{rank}-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        stream.number += 1  # type: ignore[attr-defined]
        return batch

    BatchStream.__init__ = init  # type: ignore[assignment, method-assign]
    BatchStream.__next__ = recorded  # type: ignore[method-assign]
    main(sys.argv[2:])
