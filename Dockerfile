# The service's image, for back ends of production: Vault, or an HSM whose own
# PKCS#11 module is mounted and named in ORGKEYS_PKCS11_MODULE. SoftHSM is not in it.

FROM golang:1.26.8-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
COPY client client
COPY cmd cmd
COPY internal internal
COPY policies policies
COPY vault vault
# --build-arg VERSION=v1.2.3; .git, from which go build would know it, is not in here.
ARG VERSION
RUN CGO_ENABLED=1 go build -trimpath -tags nomsgpack -ldflags="-s -w -X github.com/orgkeys/orgkeys/internal/version.release=$VERSION" -o /out/ ./cmd/orgkeys
RUN CGO_ENABLED=0 go build -trimpath -ldflags="-s -w -X github.com/orgkeys/orgkeys/internal/version.release=$VERSION" -o /out/ ./cmd/orgkeys-node ./cmd/orgkeysctl

# What docker-compose.yml sets Vault up with: the vault command line, and this
# project's policies and set-up script.
FROM hashicorp/vault:1.21.4 AS vault
FROM debian:bookworm-20260918-slim AS vault-setup
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates jq \
 && rm -rf /var/lib/apt/lists/*
COPY --from=vault /bin/vault /usr/local/bin/vault
COPY vault /opt/orgkeys/vault
COPY scripts/compose.d/vault-setup /usr/local/bin/vault-setup
USER 10001:10001
ENTRYPOINT ["vault-setup"]

FROM debian:bookworm-20260918-slim AS orgkeys
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && install -d -m 0700 -o 10001 -g 10001 /var/lib/orgkeys
COPY --from=build /out/orgkeys /usr/local/bin/orgkeys
# For bridge nodes, which take it from here: static, it runs on any Linux.
COPY --from=build /out/orgkeys-node /usr/local/bin/orgkeys-node
# For administrators, likewise.
COPY --from=build /out/orgkeysctl /usr/local/bin/orgkeysctl
COPY LICENSE /usr/share/doc/orgkeys/LICENSE
ENV ORGKEYS_DATA_DIR=/var/lib/orgkeys
VOLUME /var/lib/orgkeys
USER 10001:10001
EXPOSE 3000
# The admin listener is on loopback, a thousand ports above the public one; bash asks it, since
# there is no HTTP client in here that an intruder could use.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
  CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/4000 && printf 'GET /readyz HTTP/1.0\\r\\n\\r\\n' >&3 && read -r _ status _ <&3 && [[ $status == 200 ]]"]
ENTRYPOINT ["orgkeys"]
CMD ["serve"]
