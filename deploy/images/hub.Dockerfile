# The hub's image with nbgpu's spawner added: zero-to-jupyterhub's own hub image stays as it is, and one package comes on top.
# Take as BASE the image and tag of your own z2jh release: `helm show values jupyterhub/jupyterhub` has it under hub.image.
# Build from the checkout: docker build -f deploy/images/hub.Dockerfile --build-arg BASE=... -t nbgpu-hub .
ARG BASE=quay.io/jupyterhub/k8s-hub:4.3.1

FROM ${BASE} AS wheel
USER root
COPY . /src
RUN NBGPU_WHEEL=pure NBGPU_FRONT_END=no pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${BASE}
USER root
# What the image has stays as it is: z2jh chose those versions. Where one is too old for nbgpu, the build fails and pip says which.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip freeze | grep -E '^[A-Za-z0-9._-]+==' > /tmp/as-it-was.txt || true; \
    pip install --no-cache-dir --no-compile --constraint /tmp/as-it-was.txt "$(ls /wheels/nbgpu-*.whl)[hub]" \
    && rm /tmp/as-it-was.txt
# z2jh's hub runs as this user
USER 1000:1000
ENV PYTHONUNBUFFERED=1
