# An example of a user's image: JupyterLab and Notebook 7 (/tree) with nbgpu's status bar, panel and monitor, and NVML and the driver's API for
# Python (pynvml, cuda.bindings), with which a notebook sees its slice without a framework. The limits need nothing of it: any image works.
# Build from the checkout: docker build -f deploy/images/user.Dockerfile -t nbgpu-user .
# JupyterLab's extension is taken as `make setup` built it; where it did not, npm builds it in here, and must reach its registry.
ARG BASE=docker.io/library/python:3.12-slim

FROM ${BASE} AS wheel
COPY . /src
RUN NBGPU_WHEEL=pure pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${BASE}
COPY pyproject.toml deploy/images/requirements.py /tmp/nbgpu/
RUN python /tmp/nbgpu/requirements.py lab > /tmp/nbgpu/requirements.txt \
    && pip install --no-cache-dir "jupyterlab>=4.6,<5" "notebook>=7.5,<8" "ipykernel>=6.29" "jupyterhub>=5.4" "nvidia-ml-py>=13.615" "cuda-bindings>=12.8" \
    -r /tmp/nbgpu/requirements.txt
COPY --from=wheel /wheels /tmp/nbgpu/wheels
RUN pip install --no-cache-dir "$(ls /tmp/nbgpu/wheels/*.whl)[lab]"
RUN useradd --create-home --uid 1000 jovyan
USER 1000:1000
WORKDIR /home/jovyan
ENV HOME=/home/jovyan SHELL=/bin/bash PYTHONUNBUFFERED=1
EXPOSE 8888
CMD ["jupyterhub-singleuser"]
