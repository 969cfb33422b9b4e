"""Every kind of bad input, and the one clear line that it must lead to.

``CASES`` is what ``test_bad_input`` runs and what ``bad_input_table`` prints. A case gives a
program something bad, in a process of its own, and returns what came of it.
"""

from tests.e2e import bad_files, bad_loras, bad_peers

CASES = (*bad_files.CASES, *bad_loras.CASES, *bad_peers.CASES)
