# One image for receiver, handler service and both example workers; the command says which.
FROM python:3.11.14-slim-bookworm AS packages
COPY scripts/requirements/run.txt /requirements.txt
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r /requirements.txt

FROM python:3.11.14-slim-bookworm
ENV PATH=/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY --from=packages /venv /venv
WORKDIR /app
COPY bridge bridge
COPY caller caller
COPY handler handler
COPY examples examples
COPY deploy/__init__.py deploy/worker_health.py deploy/
COPY deploy/callback-bridge /venv/bin/
# A number, so that an orchestrator can see that it is not root.
USER 10001:10001
CMD ["callback-bridge", "--help"]
