"""`pdengine` whose HTTP server hangs when it is asked for `/health`: its loop does not turn any more."""

from threading import Event

from pdengine.cli.main import main
from pdengine.router.http.service import Service
from pdengine.transport.messages import Status


async def hang_in_status(self: Service) -> Status:
    print("the loop hangs", flush=True)
    Event().wait()
    raise AssertionError("nobody sets it")


Service.status = hang_in_status  # type: ignore[method-assign]
main()
