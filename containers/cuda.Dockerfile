# The CUDA image: Python with what envs/ locks, and FlashAttention. `make image IMAGE=cuda` builds and
# pushes it. The base is nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04: torch's wheel is built for CUDA
# 13.0, and DeepSpeed compiles with nvcc at run time.
ARG BASE=docker.io/nvidia/cuda@sha256:8b2705ea7a8653ad3451b46ab835eced92d77b44e671b9cf3ad4f95fbb2efe5e
FROM ${BASE} AS locked
COPY containers/install envs/cuda.txt envs/build.txt envs/run.txt envs/harness.txt /opt/build/
RUN /opt/build/install cuda && rm -r /opt/build

# FlashAttention has no wheel for this torch, so it is built against it, in a stage of its own.
FROM locked AS flash
COPY containers/install envs/flash.txt /opt/build/
RUN /opt/build/install flash

FROM locked
RUN --mount=type=bind,from=flash,source=/opt/flash,target=/opt/flash \
    /opt/longyarn/bin/python -m pip install --no-cache-dir --no-index --no-deps /opt/flash/*.whl \
    && /opt/longyarn/bin/python -m pip check
ARG RECIPE
LABEL longyarn.recipe="${RECIPE}"
RUN echo "${RECIPE}" > /opt/longyarn/recipe
ENV PATH=/opt/longyarn/bin:${PATH} PYTHONNOUSERSITE=1
USER 65534:65534
