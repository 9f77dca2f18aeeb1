# The CPU image: Python with what envs/ locks. `make image IMAGE=cpu` builds and pushes it.
# The base is python:3.11-slim.
ARG BASE=docker.io/library/python@sha256:9a7765b36773a37061455b332f18e265e7f58f6fea9c419a550d2a8b0e9db834
FROM ${BASE}
COPY containers/install envs/cpu.txt envs/build.txt envs/run.txt envs/harness.txt /opt/build/
RUN /opt/build/install cpu && rm -r /opt/build
ARG RECIPE
LABEL longyarn.recipe="${RECIPE}"
RUN echo "${RECIPE}" > /opt/longyarn/recipe
ENV PATH=/opt/longyarn/bin:${PATH} PYTHONNOUSERSITE=1
USER 65534:65534
