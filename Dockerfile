# The environment of scripts/setup.sh and the code, for docker, podman, enroot (pyxis) and apptainer: docs/container.md.
#
#   make image                                                               tag mrmae; IMAGE=... for another
#   docker build --build-arg BASE=nvidia/cuda:13.0.3-devel-ubuntu24.04 .     with nvcc, which NVMe offload compiles with
#
# The base image has the variables by which GPUs are passed to the container, and forward compatibility for older
# drivers. torch's wheels bring the CUDA libraries of constraints.txt, so that a larger base image would double them.
ARG BASE=nvidia/cuda:13.0.3-base-ubuntu24.04
FROM ${BASE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# System packages; a layer that only a change of setup.sh makes again.
WORKDIR /opt/mrmae
COPY scripts/setup.sh scripts/
RUN scripts/setup.sh --system && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1001 --shell /bin/bash mrmae && chown mrmae /opt/mrmae

# Python packages, with FFCV compiled and DeepSpeed's op built; a layer that only changed requirements make again.
USER 1001
COPY --chown=1001:1001 pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=1001:1001 mrmae_ds/__init__.py mrmae_ds/
RUN PIP_NO_CACHE_DIR=1 scripts/setup.sh --no-dev

# The code. The editable installation of the layer before refers to it.
COPY --chown=1001:1001 . .
ENV PATH=/opt/mrmae/.venv/bin:$PATH
CMD ["mrmae", "--help"]
