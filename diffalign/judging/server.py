"""The page over HTTP: one template, the pictures by hash, and the four things that a judge can do."""

from __future__ import annotations

import contextlib
import io
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from diffalign.console import HOME
from diffalign.judging.following import Following
from diffalign.judging.session import Session, named
from diffalign.manifests import Entry
from diffalign.pages import templates

SHOWN_AS_STORED = ("image/png", "image/jpeg", "image/webp", "image/avif", "image/bmp")  # what every browser draws
HEADERS = {  # the page is all that it needs, and nothing may stand in a frame around it
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; connect-src 'self'; form-action 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
KEPT = {"Cache-Control": "private, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
BYE = 2  # seconds for answers under way when the server is told to stop
ACTIONS: dict[str, Callable[[Session | Following, str, Mapping[str, Any]], dict[str, Any]]] = {
    "look": lambda session, judge, said: session.look(judge),
    "choose": lambda session, judge, said: session.choose(judge, *_answer(said)),
    "undo": lambda session, judge, said: session.undo(judge),
    "retake": lambda session, judge, said: session.retake(judge),
}


def build_app(session: Session | Following, judge: str | None, place: str, export: str, host: str) -> Starlette:
    """The page of a session.

    Args:
        judge: whose page it is; None asks for a name.
        place: where the pictures lie, for the title.
        export: the command that writes the preferences.
        host: under which the page is asked for. On this machine's own address no other is answered, so that no page of
            another site can ask in its name.
    """
    hosts = [*HOME, host] if host in HOME else ["*"]
    routes = [
        Route("/", home),
        Route("/picture/{sha256}", picture),
        Route("/{action}", act, methods=["POST"]),
    ]
    app = Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])
    app.state.session, app.state.judge = session, judge
    app.state.page = {"ask": session.ask, "place": place, "export": export, "of": session.count}
    return app


def home(request: Request) -> Response:
    """The page of a judge, or the question for a name."""
    state, problem, judge = request.app.state, "", request.app.state.judge
    if judge is None and "judge" in request.query_params:
        try:
            judge = named(request.query_params["judge"])
        except ValueError as error:
            problem = str(error)
    page = templates(autoescape=True).get_template("judge.html.j2")
    return HTMLResponse(page.render(judge=judge, fixed=state.judge is not None, problem=problem, **state.page),
                        headers=HEADERS)  # fmt: skip


def picture(request: Request) -> Response:
    """A picture of the session, by the hash of its file: no path comes from outside."""
    entry = request.app.state.session.pictures.get(request.path_params["sha256"])
    if entry is None:
        return JSONResponse({"error": "no such picture"}, 404)
    try:
        content, kind = drawable(entry)
    except ValueError as error:
        return JSONResponse({"error": str(error)}, 404)
    return Response(content, media_type=kind, headers=KEPT)


async def act(request: Request) -> Response:
    """One of `ACTIONS` of a judge, as JSON: {"judge": ..., and for choose "group", "verdict", "picks"}."""
    action = ACTIONS.get(request.path_params["action"])
    if action is None:
        return JSONResponse({"error": "no such action"}, 404)
    if request.headers.get("content-type") != "application/json":  # which a form of another site cannot send
        return JSONResponse({"error": "expected application/json"}, 415)
    try:
        said = await request.json()
        if not isinstance(said, dict):
            raise ValueError(f"expected an object, got {type(said).__name__}")
        session: Session | Following = request.app.state.session
        return JSONResponse(await run_in_threadpool(action, session, named(said.get("judge")), said), headers=HEADERS)
    except ValueError as error:
        return JSONResponse({"error": str(error)}, 400)
    except OSError as error:
        return JSONResponse({"error": str(error)}, 503)


def drawable(entry: Entry) -> tuple[bytes, str]:
    """The file of a picture and its type; one that browsers do not draw is a PNG of what training sees.

    Raises:
        ValueError: it has gone, or is no picture any more.
    """
    data = entry.source.read()
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = image.get_format_mimetype()
    except OSError as error:
        raise ValueError(f"{entry.image}: not a picture any more") from error
    if kind in SHOWN_AS_STORED:
        return data, str(kind)
    buffer = io.BytesIO()
    entry.source.decode(entry.image).save(buffer, "PNG")
    return buffer.getvalue(), "image/png"


def listen(host: str, port: int) -> socket.socket:
    """A socket that is open from now on; port 0 is any free one.

    Raises:
        ValueError: an address that cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: cannot be listened on ({error}); choose another --port, or 0 "
                         f"for any that is free") from error  # fmt: skip


def web_server(app: Starlette) -> uvicorn.Server:
    """What runs an app on a socket."""
    config = uvicorn.Config(app, log_config=None, log_level="error", access_log=False, lifespan="off",
                            timeout_graceful_shutdown=BYE)  # fmt: skip
    return uvicorn.Server(config)


def serve(app: Starlette, opened: socket.socket) -> None:
    """Answers until Ctrl-C or SIGTERM, which end it as they should: without an error."""
    server = web_server(app)
    with _stopping(server):
        server.run(sockets=[opened])


@contextlib.contextmanager
def _stopping(server: uvicorn.Server) -> Iterator[None]:
    """The server raises a signal that stopped it once more when it has ended; it finds these handlers."""

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answer(said: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    group, verdict, picks = said.get("group"), said.get("verdict"), said.get("picks", [])
    if not (isinstance(group, str) and isinstance(verdict, str) and isinstance(picks, list)
            and all(isinstance(picture, str) for picture in picks)):  # fmt: skip
        raise ValueError("expected group and verdict as texts and picks as a list of them")
    return group, verdict, picks
