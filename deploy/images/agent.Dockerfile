# The node agent with the limiter, compiled for glibc 2.17 because it is loaded into users' images, whatever their age.
# Build from the checkout: docker build -f deploy/images/agent.Dockerfile -t nbgpu-agent .
ARG BASE=docker.io/library/python:3.12-slim

FROM ${BASE} AS wheel
COPY . /src
RUN NBGPU_WHEEL=release NBGPU_FRONT_END=no pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${BASE}
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-compile "$(ls /wheels/nbgpu-*.whl)[agent,kubernetes]"
# Root: it looks at processes of all users on the node, and owns the files that they may only read (docs/kubernetes.md).
USER 0:0
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["python", "-m", "nbgpu_agent"]
