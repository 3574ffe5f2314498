# make image                 the service, for GPUs and CPUs
# make image VARIANT=cpu     the service without torch, which serves the architecture convnet on a CPU
# docker build -t thirtytwo-train --target train .           the training script
#
# TORCH_INDEX=ADDRESS installs torch from another index than PyPI, such as one of its builds for another CUDA.

ARG VARIANT=cuda

FROM python:3.11-slim-bookworm AS cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
WORKDIR /srv
# The first layers have the dependencies only, so that a change of the code does not install them again. An editable
# install needs no more than the version; the code follows in the last layers.
COPY LICENSE constraints.txt pyproject.toml ./
COPY app/__init__.py app/
# a new volume gets the owner of the folder it is mounted on
RUN pip install --constraint constraints.txt --editable '.[otel]' \
    && install --directory --owner=10001 --group=10001 /weights


# only torch itself comes from TORCH_INDEX: its dependencies have the versions of constraints.txt, which may not be there
FROM cpu AS cuda
ARG TORCH_INDEX
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --no-deps torch \
    && pip install --constraint constraints.txt --editable '.[cuda]'


FROM cuda AS train
ARG TORCH_INDEX
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --no-deps torchvision \
    && pip install --constraint constraints.txt --editable '.[train]'
COPY app app
COPY training training
# matplotlib keeps a cache, and the root file system may be read-only
ENV MPLCONFIGDIR=/tmp
USER 10001:10001
ENTRYPOINT ["python", "-m", "training.train"]


FROM ${VARIANT} AS serve
WORKDIR /srv
COPY app app
ENV THIRTYTWO_HOST=0.0.0.0 THIRTYTWO_PORT=8000
EXPOSE 8000
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-m", "app", "healthcheck"]
ENTRYPOINT ["python", "-m", "app"]
ARG VERSION=unknown REVISION=unknown
LABEL org.opencontainers.image.title="Thirtytwo" \
      org.opencontainers.image.description="A classifier service for 32x32 images" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="MIT"
