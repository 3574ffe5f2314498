# docker build -t thirtytwo:0.1.0 .                                the service, for GPUs and CPUs
# docker build -t thirtytwo:0.1.0-cpu --build-arg VARIANT=cpu .    the same without torch, which no CPU needs
# docker build -t thirtytwo-train:0.1.0 --target train .           the training script
#
# TORCH_INDEX=ADDRESS takes torch from another index than PyPI, such as one of its builds for another CUDA.

ARG VARIANT=cuda

FROM python:3.11-slim-bookworm AS python
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
WORKDIR /srv


# in a stage of its own, so that only a change of these lists, and none of the rest of the file, installs anything anew
FROM python AS requirements
COPY pyproject.toml ./
RUN python -c "import tomllib; \
    project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = project['optional-dependencies']; \
    serve = [line for line in project['dependencies'] if not line.startswith('torch')] + extras['otel']; \
    open('serve.txt', 'w').write('\n'.join(serve)); \
    open('train.txt', 'w').write('\n'.join(extras['train']))"


FROM python AS cpu
COPY constraints.txt ./
COPY --from=requirements /srv/serve.txt ./
# a new volume takes the owner of the folder it is mounted on, which is why /weights is there
RUN pip install --constraint constraints.txt --requirement serve.txt \
    && install --directory --owner=10001 --group=10001 /weights


# only torch itself comes from TORCH_INDEX: what it needs has the versions of constraints.txt, which may not be there
FROM cpu AS cuda
ARG TORCH_INDEX
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --no-deps torch \
    && pip install --constraint constraints.txt torch


FROM cuda AS train
ARG TORCH_INDEX
COPY --from=requirements /srv/train.txt ./
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --no-deps torchvision \
    && pip install --constraint constraints.txt --requirement train.txt
COPY LICENSE ./
COPY app app
COPY training training
# matplotlib keeps a cache, and the root file system may be read-only
ENV MPLCONFIGDIR=/tmp
USER 10001:10001
ENTRYPOINT ["python", "-m", "training.train"]


FROM ${VARIANT} AS serve
WORKDIR /srv
COPY LICENSE ./
COPY app app
ENV THIRTYTWO_HOST=0.0.0.0 THIRTYTWO_PORT=8000
EXPOSE 8000
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-m", "app", "healthcheck"]
ENTRYPOINT ["python", "-m", "app"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Thirtytwo" \
      org.opencontainers.image.description="A classifier service for 32x32 images" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="MIT"
