# Locust with our users: master or worker, as the command says. No torch, no server.
FROM python:3.11-slim-bookworm

ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache/home
WORKDIR /opt/flightline
COPY pyproject.toml ./
# The part of the project's pinned packages that sends requests.
RUN python3 -c "import re, tomllib; \
wanted = {'numpy', 'tokenizers', 'tritonclient', 'protobuf', 'locust', 'uvloop', 'httptools', 'scipy', 'psutil', 'matplotlib', 'requests'}; \
pins = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
print('\n'.join(pin for pin in pins if re.split(r'[=[]', pin)[0] in wanted))" > requirements.txt \
    && python3 -m pip install --no-cache-dir --requirement requirements.txt \
    && mkdir -p /cache/home \
    && chown -R 1000:1000 /cache

COPY client client
COPY loadtest loadtest
COPY flightline flightline

USER 1000:1000
# Matplotlib keeps its list of fonts in HOME.
VOLUME ["/cache"]
EXPOSE 8089 5557
ENTRYPOINT ["python3", "-m", "loadtest.locust_main", "-f", "loadtest/locustfile.py"]
