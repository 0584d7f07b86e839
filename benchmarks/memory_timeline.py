"""The figure of a run's memory over its whole course: vanilla, the run, and the run with every memory option.

    python benchmarks/memory_timeline.py llama_1.2b train.per_device_train_batch_size=4 \
        train.gradient_accumulation_steps=1 --output docs/images/memory_timeline.png
    python benchmarks/memory_timeline.py corpus_10m --measured --output docs/images/memory_timeline_measured.png

Filled areas are counted on fake tensors, in a minute or two for 1.2B parameters; with --measured on real ones, on the
CPU. Lines and circles are the plan's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from steplm import load_config
from steplm.report.timeline import timeline_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a recipe or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, default=Path("docs/images/memory_timeline.png"))
    parser.add_argument("--measured", action="store_true", help="on real tensors, on the CPU: small models only")
    arguments = parser.parse_args()
    config = load_config(arguments.run, arguments.overrides)
    print(timeline_figure(config, arguments.output, measured=arguments.measured))


if __name__ == "__main__":
    main()
