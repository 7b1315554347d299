# toast-onnx for NVIDIA GPUs, on NVIDIA's image with TensorRT, its Python package and trtexec.
#   docker build -f docker/gpu.Dockerfile -t toast-onnx:gpu .
ARG BASE=nvcr.io/nvidia/tensorrt:25.10-py3

FROM ${BASE} AS build
ARG EXTRAS=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
COPY . .
# The environment sees the base's packages: TensorRT comes from there. The base pins versions of its own for pip
# (PIP_CONSTRAINT), which are not this package's.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    unset PIP_CONSTRAINT \
    && python3 -m venv --system-site-packages /opt/toast \
    && python3 -m venv /opt/backend \
    && /opt/backend/bin/pip wheel --no-deps --wheel-dir /wheels . \
    && /opt/toast/bin/pip install "$(echo /wheels/*.whl)${EXTRAS:+[$EXTRAS]}" \
    && /opt/toast/bin/python -c "import tensorrt"

FROM ${BASE}
LABEL org.opencontainers.image.title="toast-onnx" \
      org.opencontainers.image.description="Structured pruning of exported Vision Transformers, with TensorRT" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/toast /opt/toast
# Not 1000: Ubuntu images bring a user of that number.
RUN useradd --create-home --uid 10001 toast && install --directory --owner=toast --group=toast /work
ENV PATH=/opt/toast/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
# Loads ONNX Runtime and the graph tools; fails where a library is missing.
HEALTHCHECK --interval=1m --timeout=30s CMD ["python3", "-c", "import onnxruntime, toast_onnx_cli.inspect"]
ENTRYPOINT ["toast-onnx"]
CMD ["--help"]
