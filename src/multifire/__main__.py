import sys

from multifire.cli import main

sys.exit(main())
