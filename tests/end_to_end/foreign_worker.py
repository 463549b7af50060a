"""`pdengine` whose workers claim what the variable FOREIGN holds, such as `layout=column-major`."""

import os

from pdengine.cli.main import main
from pdengine.engine import start_worker
from pdengine.transport.messages import Compatibility

field, _, value = os.environ["FOREIGN"].partition("=")


def foreign_compatibility(**fields: str | int) -> Compatibility:
    fields[field] = type(fields[field])(value)
    return Compatibility(**fields)  # type: ignore[arg-type]


start_worker.Compatibility = foreign_compatibility  # type: ignore[assignment, misc]
main()
