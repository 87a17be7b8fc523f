"""`python -m finetune`, as launchers of several processes call it."""

import sys

from finetune.cli.main import main

sys.exit(main())
