"""`python -m hf_vlmerge.cli`, for launchers that start modules."""

import sys

from hf_vlmerge.cli import main

sys.exit(main())
