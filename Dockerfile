# syntax=docker/dockerfile:1.7
# The self-hosted server in a container: docs/deploy.md says how to build and run it.
#
#   docker build --tag stepspan:cuda .                          on a machine with an NVIDIA GPU
#   docker build --tag stepspan:cpu --build-arg VARIANT=cpu .   the demo model, on any machine
#
# A build that must give the same image again names the base by its digest:
#   --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
# Packages come from pip's default index. A pip configuration of yours (a mirror, an index with CPU
# wheels of torch) is read during the build, and is in no layer: --secret id=pip,src=pip.conf
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
ARG VARIANT=cuda

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY metrics metrics
COPY kernels_warmup kernels_warmup
COPY serve serve
COPY bench bench
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /build \
    && /build/bin/python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# Every package in the version that the tests ran with: all that a development environment has, and
# what only a GPU machine needs, from the list that fal installs.
# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS packages
ARG VARIANT
WORKDIR /pins
COPY pyproject.toml requirements.lock ./
RUN python3 -c "import tomllib; \
fal = tomllib.load(open('pyproject.toml', 'rb'))['tool']['fal']['apps']['sdxl']; \
print(*[pin for pin in fal['requirements'] if '==' in pin], sep='\n')" > fal.txt
COPY --from=wheel /wheel /wheel
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    extras=model; test "${VARIANT}" != cuda || extras=model,gpu; \
    python3 -m venv /opt/stepspan \
    && /opt/stepspan/bin/python -m pip install --no-cache-dir \
       --constraint requirements.lock --constraint fal.txt \
       "stepspan[${extras}] @ file://$(ls /wheel/*.whl)" \
    && /opt/stepspan/bin/python -m pip uninstall --yes pip setuptools

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS base-cpu

# torch brings CUDA's libraries in its own packages and the host brings the driver, so the base needs
# no CUDA. Triton compiles a launcher for each kernel with the system's C compiler, inductor some of
# the rest with the C++ one.
# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS base-cuda
# Debian keeps one version of a package at a time: a pinned one could not be installed next month.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM base-${VARIANT} AS service
LABEL org.opencontainers.image.title="stepspan" \
      org.opencontainers.image.licenses="Apache-2.0"
# With a name, because torch looks the user up. The folder is closed to others, because code is
# loaded from it.
RUN groupadd --gid 10001 stepspan \
    && useradd --uid 10001 --gid stepspan --no-create-home --home-dir /var/cache/stepspan \
       --shell /usr/sbin/nologin stepspan \
    && install --directory --owner stepspan --group stepspan --mode 0700 /var/cache/stepspan
COPY --from=packages /opt/stepspan /opt/stepspan
# Weights and compiled kernels are kept in the one folder that the service may write to. Beside it
# there is /tmp, for files that go with the process.
ENV PATH=/opt/stepspan/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/cache/stepspan/huggingface \
    SDXL_CACHE_DIR=/var/cache/stepspan/compiled
USER 10001:10001
WORKDIR /var/cache/stepspan
VOLUME ["/var/cache/stepspan"]
EXPOSE 8080
# The server drains on SIGTERM. `docker stop` kills after 10 seconds unless it is told to wait longer
# than a request's deadline: docker stop --time 80, stop_grace_period in compose.yaml.
STOPSIGNAL SIGTERM
# /health answers while the model loads and compiles, so the start needs no long grace. Asked without
# the proxy that HTTP_PROXY may name.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "from urllib import request; request.build_opener(request.ProxyHandler({})).open('http://127.0.0.1:8080/health', timeout=4)"]
# Every interface of the container's own network; what of it the host publishes is the host's choice.
# `docker run stepspan:cpu doctor` runs another command of the program.
ENTRYPOINT ["stepspan"]
CMD ["--host", "0.0.0.0", "--port", "8080"]
