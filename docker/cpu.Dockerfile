# toast-onnx on the CPU, with TensorRT-RTX, which builds engines without a GPU.
#   docker build -f docker/cpu.Dockerfile -t toast-onnx:cpu .
ARG BASE=python:3.13.9-slim-bookworm

FROM ${BASE} AS build
ARG EXTRAS=tensorrt-rtx
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
COPY . .
# Wheels first, so that neither the sources nor the build backend reach the last stage.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /opt/toast \
    && python3 -m venv /opt/backend \
    && /opt/backend/bin/pip wheel --no-deps --wheel-dir /wheels . \
    && /opt/toast/bin/pip install "$(echo /wheels/*.whl)${EXTRAS:+[$EXTRAS]}" \
    && /opt/toast/bin/pip uninstall --yes pip

FROM ${BASE}
LABEL org.opencontainers.image.title="toast-onnx" \
      org.opencontainers.image.description="Structured pruning of exported Vision Transformers, CPU" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/toast /opt/toast
RUN useradd --create-home --uid 10001 toast && install --directory --owner=toast --group=toast /work
ENV PATH=/opt/toast/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
# Loads ONNX Runtime and the graph tools; fails where a library is missing.
HEALTHCHECK --interval=1m --timeout=30s CMD ["python3", "-c", "import onnxruntime, toast_onnx_cli.inspect"]
ENTRYPOINT ["toast-onnx"]
CMD ["--help"]
