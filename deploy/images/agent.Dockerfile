# The node agent with the limiter, compiled for glibc 2.17 because it is loaded into users' images, whatever their age.
# Build from the checkout: docker build -f deploy/images/agent.Dockerfile -t nbgpu-agent .
ARG BASE=docker.io/library/python:3.12-slim

# line by line as in pool.Dockerfile and hub.Dockerfile: on the same base it is built once for the three
FROM ${BASE} AS wheel
USER 0:0
COPY . /src
RUN NBGPU_WHEEL=release NBGPU_FRONT_END=no pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${BASE}
COPY pyproject.toml deploy/images/requirements.py /tmp/nbgpu/
RUN python /tmp/nbgpu/requirements.py agent kubernetes > /tmp/nbgpu/requirements.txt \
    && pip install --no-cache-dir --no-compile -r /tmp/nbgpu/requirements.txt
COPY --from=wheel /wheels /tmp/nbgpu/wheels
# imported once, so that what it imports lies compiled: the pod's file system is read-only
RUN pip install --no-cache-dir --no-compile "$(ls /tmp/nbgpu/wheels/*.whl)[agent,kubernetes]" \
    && python -c "import nbgpu_agent.main"
# Root: it looks at processes of all users on the node, and owns the files that they may only read (docs/kubernetes.md).
USER 0:0
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["python", "-m", "nbgpu_agent"]
