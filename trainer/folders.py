"""Where a run and its shards are, as JSON: `python -m trainer.folders ARGUMENTS-OF-TRAINING`.

For batch scripts, at every start of a job. It checks the settings by themselves, without torch.
"""

import argparse
import json
import sys

from data_pipeline.errors import InputError
from trainer.config import add_arguments, load_config


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="trainer.folders", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.recipe, options.config, options.settings)
    except InputError as error:
        print(f"maskbank: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps({"run": config.run.directory, "shards": config.data.shards}))


if __name__ == "__main__":
    main()
