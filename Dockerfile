# docker build -t banko-submit .
# docker run --gpus all -v "$PWD/models:/app/models:ro" -v "$PWD/outputs:/outputs" banko-submit cifar100
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# Dependencies before code: a change of the code rebuilds only the last layer.
COPY requirements.txt /app/
RUN pip install --no-cache-dir -r /app/requirements.txt

# The weights are expected in the image or mounted. The embedded stand-in is never submitted by accident, and nothing
# is fetched at run time.
ENV BANKO_PYTHON=python3 \
    BANKO_MODEL=/app/models/sdxl-turbo \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 10001 banko && install -d -o banko /outputs
COPY run.sh /app/
COPY submission /app/submission
USER 10001
# The default --output, outputs/, is /outputs from here.
WORKDIR /
ENTRYPOINT ["/app/run.sh"]
CMD ["--help"]
