"""`python -m nextscale.cli`."""

import sys

from nextscale.cli.parser import main

sys.exit(main())
