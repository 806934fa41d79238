# syntax=docker/dockerfile:1
# `fusionkit serve` of one bundle. From the project's root:
#
#   docker build -t fusionkit .
#   docker run -p 127.0.0.1:8000:8000 -v ./lm.bundle:/bundle:ro -v ./base:/base:ro \
#       -e FUSIONKIT_API_KEYS fusionkit
#
# PyTorch is the build for CPUs; for GPUs: --build-arg TORCH=https://download.pytorch.org/whl/cu128

FROM python:3.11-slim AS built
ARG TORCH=https://download.pytorch.org/whl/cpu
WORKDIR /source
RUN python -m venv /opt/fusionkit
ENV PATH=/opt/fusionkit/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# pyproject.toml says which versions may be.
# hadolint ignore=DL3013
RUN pip install torch torchvision --index-url "$TORCH"
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY fusionkit fusionkit
# hadolint ignore=DL3013
RUN pip install '.[serve]'

FROM python:3.11-slim
LABEL org.opencontainers.image.title="FusionKit" \
      org.opencontainers.image.description="A bundle's tasks over HTTP: one base in memory" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --create-home --home-dir /home/fusionkit --shell /usr/sbin/nologin fusionkit
COPY --from=built /opt/fusionkit /opt/fusionkit
ENV PATH=/opt/fusionkit/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/tmp/numba
USER 10001
WORKDIR /home/fusionkit
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["fusionkit", "serve"]
CMD ["/bundle", "--base", "/base", "--host", "0.0.0.0", "--port", "8000"]
