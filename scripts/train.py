"""``biscale-gym train`` as a script.

python scripts/train.py configs/training/smoke.yaml
"""

from __future__ import annotations

import sys

from biscale_gym.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
