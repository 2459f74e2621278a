"""The published method written out plainly (`benchmarks.plain_method`) as a contender.

    python -m benchmarks.compare_plain [--root FOLDER --shards FOLDER] [--rounds 5]

The same objective, views, network and sizes as maskbank's; in float32, with PIL and a DataLoader, a
replicated queue and dense logits.
"""

import argparse

from benchmarks.contender import claim_protocol, serve
from benchmarks.side_by_side import script


def contend(options: argparse.Namespace) -> None:
    claim_protocol()
    import torch

    from benchmarks.plain_method import PlainMethod

    plain = PlainMethod(
        options.root,
        size=options.size,
        batch_size=options.batch,
        workers=options.workers,
        steps=options.total_steps,
    )
    settings = {
        "network": "resnet18, DeepLabV3 head",
        "views": 2,
        "size": options.size,
        "batch": options.batch,
        "precision": "float32",
        "bank": len(plain.queue),
        "workers": options.workers,
        "threads": torch.get_num_threads(),
        "prefetched": 2 * options.workers,
    }
    serve(plain.step, "plain", settings, plain.save)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--total-steps", type=int, default=1500, help="of the schedule")


if __name__ == "__main__":
    script(__doc__, ["maskbank", "plain"], contend, add_arguments)
