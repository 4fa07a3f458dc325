# The hub's image with nbgpu's spawner added: zero-to-jupyterhub's own hub image stays as it is, and one package comes on top.
# Take as BASE the image and tag of your own z2jh release: `helm show values jupyterhub/jupyterhub` has it under hub.image.
# Build from the checkout: docker build -f deploy/images/hub.Dockerfile --build-arg BASE=... -t nbgpu-hub .
ARG BASE=quay.io/jupyterhub/k8s-hub:4.3.1

# line by line as in agent.Dockerfile and pool.Dockerfile: on the same base it is built once for the three
FROM ${BASE} AS wheel
USER 0:0
COPY . /src
RUN NBGPU_WHEEL=release NBGPU_FRONT_END=no pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${BASE}
USER 0:0
COPY pyproject.toml deploy/images/requirements.py /tmp/nbgpu/
# What the image has stays as it is: z2jh chose those versions. Where one is too old for nbgpu, the build fails and pip says which.
RUN pip freeze | grep -E '^[A-Za-z0-9._-]+==' > /tmp/nbgpu/as-it-was.txt || true; \
    python /tmp/nbgpu/requirements.py hub > /tmp/nbgpu/requirements.txt \
    && pip install --no-cache-dir --constraint /tmp/nbgpu/as-it-was.txt -r /tmp/nbgpu/requirements.txt
COPY --from=wheel /wheels /tmp/nbgpu/wheels
RUN pip install --no-cache-dir --constraint /tmp/nbgpu/as-it-was.txt "$(ls /tmp/nbgpu/wheels/*.whl)[hub]"
# z2jh's hub runs as this user
USER 1000:1000
ENV PYTHONUNBUFFERED=1
