# The pool allocator. Build from the checkout: docker build -f deploy/images/pool.Dockerfile -t nbgpu-pool .
ARG BASE=docker.io/library/python:3.12-slim

# line by line as in agent.Dockerfile and hub.Dockerfile: on the same base it is built once for the three
FROM ${BASE} AS wheel
USER 0:0
COPY . /src
RUN NBGPU_WHEEL=release NBGPU_FRONT_END=no pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${BASE}
COPY pyproject.toml deploy/images/requirements.py /tmp/nbgpu/
RUN python /tmp/nbgpu/requirements.py pool kubernetes > /tmp/nbgpu/requirements.txt \
    && pip install --no-cache-dir --no-compile -r /tmp/nbgpu/requirements.txt
COPY --from=wheel /wheels /tmp/nbgpu/wheels
# imported once, so that what it imports lies compiled: the pod's file system is read-only
RUN pip install --no-cache-dir --no-compile "$(ls /tmp/nbgpu/wheels/*.whl)[pool,kubernetes]" \
    && python -c "import nbgpu_pool.main, nbgpu_pool.kube_main"
# a number, so that Kubernetes can tell that it is not root
USER 65532:65532
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8200
ENTRYPOINT ["python", "-m", "nbgpu_pool"]
