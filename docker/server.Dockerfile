# The server on an NVIDIA GPU: NVIDIA's Triton with TensorRT-LLM, and our models baked in.
# Declared before FROM only because FROM uses it; nothing after FROM does.
ARG IMAGE=nvcr.io/nvidia/tritonserver:26.06-trtllm-python-py3
FROM ${IMAGE}

# NVIDIA's Python packages live in a virtual environment from 26.03 on; before, the folder does not exist.
# HOME: NVIDIA's user triton-server (uid 1000) has none, and FlashInfer (~/.cache) and Triton's language (~/.triton)
# write there as soon as TensorRT-LLM is imported.
ENV PATH=/opt/venv-tritonserver/bin:${PATH} \
    PYTHONPATH=/opt/flightline \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache/home \
    HF_HOME=/cache/huggingface \
    BUILD_DIR=/engines

# Only what NVIDIA's image lacks, and without dependencies: its own torch and numpy must stay. tritonclient refuses a
# protobuf older than 6.33.5 when it is imported (its wheel asks only for 6.30), and NVIDIA's images pin none. The
# import is tried here, so that an image in which it fails is not built.
RUN python3 -m pip install --no-cache-dir --no-deps \
        tritonclient==2.73.0 protobuf==6.33.6 ml-dtypes==0.5.4 python-rapidjson==1.25 grpcio==1.85.1 \
        psutil==7.2.2 gguf==0.19.0 llguidance==1.9.1 uvicorn==0.54.0 httptools==0.9.0 uvloop==0.23.0 \
        orjson==3.13.0 prometheus_client==0.26.0 h2==4.4.1 hpack==4.2.0 hyperframe==6.1.0 \
    && python3 -c "from tritonclient.grpc import model_config_pb2" \
    && mkdir -p /engines /cache/huggingface /cache/home \
    && chown -R 1000:1000 /engines /cache

COPY client /opt/flightline/client
COPY engine_build /opt/flightline/engine_build
COPY gateway /opt/flightline/gateway
COPY model_repository /opt/flightline/model_repository
COPY supervisor /opt/flightline/supervisor
COPY torch_engine /opt/flightline/torch_engine
COPY flightline /opt/flightline/flightline
COPY docker/entrypoint.sh docker/healthcheck.py /opt/flightline/docker/

# Not the repository's root: a clone of TensorRT-LLM as working folder hides the installed package.
WORKDIR /opt/flightline
USER 1000:1000
VOLUME ["/engines", "/cache"]
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=25s --start-period=30m --retries=3 \
    CMD ["python3", "/opt/flightline/docker/healthcheck.py"]
ENTRYPOINT ["/opt/flightline/docker/entrypoint.sh"]
CMD ["serve"]
