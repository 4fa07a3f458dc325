# The agent of a later release, as far as an upgrade's test needs one: other files for users' containers, so that they lie beside the old.
ARG BASE=localhost/nbgpu-agent:test
FROM ${BASE}
RUN echo later > "$(python -c 'import nbgpu_agent; print(nbgpu_agent.__path__[0])')/_lib/later"
