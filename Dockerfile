# docker build -t thirtytwo .                                 torch from PyPI, which on x86-64 is the CUDA build
# docker build -t thirtytwo --build-arg TORCH_INDEX=URL .     torch from another index, such as that of its CPU builds
# docker build -t thirtytwo-train --target train .            the training script

FROM python:3.11-slim-bookworm AS dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
WORKDIR /srv

# By far the largest layer comes first, so that it is built again only with new versions. Only torch itself is taken
# from TORCH_INDEX: what it needs has the versions of constraints.txt, which that index may not hold.
COPY constraints.txt ./
ARG TORCH_INDEX
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --no-deps torch \
    && pip install --constraint constraints.txt torch

COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
# a new volume takes the owner of the folder it is mounted on
RUN install --directory --owner=10001 --group=10001 /weights


FROM dependencies AS train
ARG TORCH_INDEX
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --no-deps torchvision \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['train'], sep='\n')" \
    > requirements-train.txt \
    && pip install --constraint constraints.txt --requirement requirements-train.txt
COPY LICENSE ./
COPY app app
COPY training training
# matplotlib keeps a cache, and the root file system may be read-only
ENV MPLCONFIGDIR=/tmp
USER 10001:10001
ENTRYPOINT ["python", "-m", "training.train"]


FROM dependencies AS serve
COPY LICENSE ./
COPY app app
ENV THIRTYTWO_HOST=0.0.0.0 THIRTYTWO_PORT=8000
EXPOSE 8000
USER 10001:10001
# http.client, because urllib would obey a proxy from the environment
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-c", "import http.client, os, sys; \
    to = http.client.HTTPConnection('127.0.0.1', int(os.environ['THIRTYTWO_PORT']), timeout=4); \
    to.request('GET', '/readyz'); sys.exit(to.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "app"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Thirtytwo" \
      org.opencontainers.image.description="A classifier service for 32x32 images" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="MIT"
