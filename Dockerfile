# etcdfs in a container. What it mounts is seen outside of it only where a directory of the host is
# given to it with `rshared` propagation; docs/operations.md has the commands.
FROM python:3.13-slim-bookworm AS build
# The base image decides which versions there are.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libfuse3-dev pkg-config \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN python -m venv /opt/etcdfs \
    && /opt/etcdfs/bin/pip install --no-cache-dir --constraint /src/constraints.txt /src

FROM python:3.13-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends fuse3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/etcdfs /opt/etcdfs
ENV PATH=/opt/etcdfs/bin:$PATH ETCDFS_CACHE=on ETCDFS_ALLOW_OTHER=on
# SIGTERM publishes what was written, and unmounts.
STOPSIGNAL SIGTERM
ENTRYPOINT ["etcdfs", "mount", "--foreground"]
CMD ["/mnt/etcdfs/etcd"]
