"""The routes of the board: the student runs, and the end of a service."""

from typing import Any

from fastapi import FastAPI, Request

from salt_distill.common.protocol import Progress, Route, Standing
from salt_distill.teacher_server.board.board import Ending
from salt_distill.teacher_server.http.errors import ApiError
from salt_distill.teacher_server.http.front import Note
from salt_distill.teacher_server.http.replica import TeacherService, run_id


def add_board_routes(app: FastAPI, service: TeacherService) -> None:
    """Adds them to a service's app."""

    @app.get(Route.RUNS)
    async def runs() -> list[dict[str, Any]]:
        """The student runs, the one heard of last first."""
        return await service.board.runs()

    @app.get(Route.RUN)
    async def one_run(run: str) -> dict[str, Any]:
        """One of them, with its configuration, and its loss against steps and FLOPs."""
        found = await service.board.run(run_id(run))
        if found is None:
            raise ApiError(
                404,
                "the board knows no such run",
                expected="an id of GET /v1/runs",
                got=run,
                hint="see GET /v1/runs",
            )
        return found

    @app.post(Route.PROGRESS)
    async def progress(run: str, progress: Progress, request: Request) -> Standing:
        """Where a student run is; answers where that is in its group, and whether it is to wait for the
        others."""
        note: Note = request.state.note
        note.run = run_id(run)
        note.token.require_run(run)
        note.token.require_group(progress.group)
        return await service.board.post(run, progress)

    @app.post(Route.DRAIN)
    async def drain() -> dict[str, str]:
        """From now on no request for targets is begun, on any replica; those that were are answered."""
        await service.end(Ending.DRAIN)
        return {"ending": service.ending.name.lower()}

    @app.post(Route.STOP)
    async def stop() -> dict[str, str]:
        """Drains the service, and then ends the `salt-serve teacher` that it belongs to."""
        await service.end(Ending.STOP)
        return {"ending": service.ending.name.lower()}
