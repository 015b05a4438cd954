# docker build -t banko-submit .
# docker run --gpus all -v "$PWD/outputs:/outputs" banko-submit
#
# The last target, `gpu`, is the default and holds SDXL-Turbo; `cpu` is small and generates with the embedded stand-in.
# The base is any Debian with Python 3.11 or newer and its venv module.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS base
# pip's own settings, for a build of torch that is not on the public index, or a build without network.
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
# The requirement to install in place of the torch in requirements.txt.
ARG TORCH
# Dependencies before code: a change of the code rebuilds only the last layers.
COPY requirements.txt requirements-ray.txt /app/
RUN sed -i "s|^torch==.*|${TORCH:-&}|" /app/requirements.txt \
    && python3 -m venv /opt/banko \
    && /opt/banko/bin/pip install --no-cache-dir -r /app/requirements.txt -r /app/requirements-ray.txt
RUN useradd --uid 10001 --create-home banko && install -d -o banko -g banko /outputs
ENV PATH=/opt/banko/bin:$PATH \
    BANKO_PYTHON=python3 \
    BANKO_CONTAINER=1 \
    PYTHONUNBUFFERED=1
# The default --output, outputs/, is /outputs from here.
WORKDIR /
ENTRYPOINT ["/app/run.sh"]
CMD ["cifar100", "tinyimagenet"]

FROM base AS cpu
ENV BANKO_MODEL=embedded
COPY run.sh /app/
COPY submission /app/submission
# A checkout by someone with a umask of 027 would be closed to the image's user.
RUN chmod -R a+rX /app
USER 10001:10001

# SDXL-Turbo's files: those in the folder WEIGHTS of the build context; what is missing there comes from the hub. All
# weights are held to their published SHA-256. The default are the configurations alone.
FROM base AS weights
ARG WEIGHTS=tools/sdxl_turbo
COPY ${WEIGHTS} /weights
WORKDIR /fetch
COPY tools/__init__.py tools/fetch_weights.py tools/
COPY submission/__init__.py submission/arguments.py submission/errors.py submission/streams.py submission/
COPY submission/machine/__init__.py submission/machine/disk.py submission/machine/
COPY submission/model/__init__.py submission/model/checkpoint.py submission/model/choice.py submission/model/hub.py \
    submission/model/recipe.py submission/model/
COPY submission/model/recipes submission/model/recipes
RUN python3 -m tools.fetch_weights sdxl-turbo /weights && chmod -R a+rX /weights

FROM base AS gpu
# The stand-in is never submitted by accident, and nothing is fetched at run time.
ENV BANKO_MODEL=/app/models/sdxl-turbo \
    HF_HUB_OFFLINE=1
COPY --from=weights /weights /app/models/sdxl-turbo
COPY run.sh /app/
COPY submission /app/submission
RUN chmod -R a+rX /app
USER 10001:10001
