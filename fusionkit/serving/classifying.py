"""`POST /predict`: what each task's classifier says of rows."""

import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fusionkit.serving.asked_task import task_of
from fusionkit.serving.bodies import PredictBody
from fusionkit.serving.failures import RefusedError
from fusionkit.serving.gate import record_of
from fusionkit.serving.link import Link
from fusionkit.serving.requests import Predict, Prediction
from fusionkit.serving.responses import Predictions
from fusionkit.serving.settings import Limits


def router(link: Link, limits: Limits) -> APIRouter:
    """The route.

    Args:
        link: the line to the model's process.
        limits: how much may be asked.
    """
    routes = APIRouter(tags=["classifiers"])

    @routes.post("/predict", response_model=Predictions)
    async def predict(body: PredictBody, request: Request) -> Response:
        """Classify inputs, or predict their numbers."""
        record, rows = record_of(request.scope), body.rows
        if len(rows) > limits.rows:
            raise RefusedError(
                400,
                f"`inputs`: a request has at most {limits.rows} here, got {len(rows)}; send "
                "several requests",
                param="inputs",
            )
        task, picked = await task_of(link, body.task, link.tasks, "task", rows, record)
        asked = link.ask([Predict(task, row) for row in rows], record.deadline)
        record.closing.append(asked.close)
        found: list[dict[str, Any]] = [{}] * len(rows)
        async for place, prediction in asked.answers():
            found[place] = _plain(prediction)
            record.prompt_tokens += prediction.tokens
        usage = {"prompt_tokens": record.prompt_tokens}
        content = {"task": task, "predictions": found, "usage": usage, **picked}
        return Response(json.dumps(content), media_type="application/json")

    return routes


def _plain(prediction: Prediction) -> dict[str, Any]:
    labels = prediction.labels
    if len(set(labels)) < len(labels):  # two classes of one name
        labels = tuple(map(str, range(len(labels))))
    return {
        "label": prediction.label,
        "probabilities": dict(zip(labels, prediction.probabilities, strict=True)),
        "value": prediction.value,
    }
