"""Where a run and its shards are, as JSON: `python -m trainer.folders ARGUMENTS-OF-TRAINING`.

For batch scripts, at every start of a job. It checks the settings by themselves, without torch.
`--check` does so before a job is submitted, from where its configuration file may not be seen.
"""

import argparse
import json
import sys

from data_pipeline.errors import InputError
from trainer.config import add_arguments, check_settings, load_config


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="maskbank train", description=__doc__)
    parser.add_argument("--check", action="store_true", help="the settings, and print nothing")
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.check and options.config is not None and not options.config.exists():
            check_settings(options.recipe, options.settings)
            return
        config = load_config(options.recipe, options.config, options.settings)
    except InputError as error:
        print(f"maskbank: {error}", file=sys.stderr)
        sys.exit(2)
    if options.check:
        return
    print(json.dumps({"run": config.run.directory, "shards": config.data.shards}))


if __name__ == "__main__":
    main()
