# The pool allocator. Build from the checkout: docker build -f deploy/images/pool.Dockerfile -t nbgpu-pool .
ARG BASE=docker.io/library/python:3.12-slim

FROM ${BASE} AS wheel
COPY . /src
RUN NBGPU_WHEEL=pure NBGPU_FRONT_END=no pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${BASE}
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-compile "$(ls /wheels/nbgpu-*.whl)[pool,kubernetes]"
# a number, so that Kubernetes can tell that it is not root
USER 65532:65532
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8200
ENTRYPOINT ["python", "-m", "nbgpu_pool"]
