"""`python -m onepass.benches`: the same as `onepass bench`."""

import sys

from . import main

sys.exit(main())
