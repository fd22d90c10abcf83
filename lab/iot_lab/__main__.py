"""`python3 -m iot_lab`, which lab/bin/lab calls."""

import sys

from iot_lab.cli import main

sys.exit(main())
