"""One run in a process of its own: `python -m reftune.comparison.worker FOLDER METHOD SEED`.

It reads the comparison's recipe from its folder and writes one JSON object a line to standard output, each after a
mark, so that whatever a library prints there is told apart.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MARK = "\x1ereftune "
FAILED = 3
"""Exit status of a run that failed in a way its user can mend; the message was told."""


def main(arguments: list[str]) -> int:
    """Execute a run and tell how it goes on."""
    from reftune.comparison.recipe import resolve_comparison
    from reftune.comparison.single_run import execute
    from reftune.errors import ReftuneError

    folder, name, seed = arguments

    def tell(news: dict[str, Any]) -> None:
        print(MARK + json.dumps(news), flush=True)

    try:
        recipe = resolve_comparison(folder)
        execute(recipe, recipe.method(name), int(seed), tell, own_process=True)
    except ReftuneError as error:
        tell({"error": str(error)})
        return FAILED
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
