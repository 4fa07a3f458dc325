# What most test pods run: an image that knows nothing of nbgpu, as users bring it.
ARG BASE=docker.io/library/python:3.12-slim
FROM ${BASE}
